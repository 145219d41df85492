import assert from "node:assert/strict";
import { type TestContext, test } from "node:test";
import { type ChatOptions, jsonSchema, type Prompt } from "tokenwire";
import { ChatRequestSchema, create, FunctionToolSchema, toJson } from "tokenwire/v1";
import { pair } from "./harness.js";

const model = "m";

/** The request as it arrived, in the JSON form of protobuf. */
async function sent(t: TestContext, prompt: Prompt, options: ChatOptions = {}): Promise<unknown> {
  const { gateway, client } = await pair(t);
  gateway.reply("ok");
  await client.chat(prompt, { model, ...options });
  const request = gateway.calls[0]?.request;
  assert.ok(request);
  return toJson(ChatRequestSchema, request);
}

/** What TypeScript would not let pass, and JavaScript does. */
// biome-ignore lint/suspicious/noExplicitAny: wrong on purpose
const wrong = (value: unknown): any => value;

test("every option arrives in its field; zero and false are values", async (t) => {
  const options = {
    temperature: 0,
    topP: 0.5,
    topK: 5,
    minP: 0.25,
    maxCompletionTokens: 10,
    stop: "END",
    frequencyPenalty: 0,
    presencePenalty: -1,
    repetitionPenalty: 1.5,
    seed: 2n ** 60n + 1n,
    choiceCount: 2,
    logprobs: false,
    topLogprobs: 3,
    logitBias: { 50256: -100 },
    reasoningEffort: "low",
    enableThinking: false,
    verbosity: "high",
    parallelToolCalls: true,
    tools: [{ name: "f", description: "d", parameters: { type: "object" }, strict: true }],
    toolChoice: "required",
    responseFormat: "json_object",
    roleTemplates: [{ role: "env", apiRole: "system", begin: "<", end: ">" }],
    endUserId: "u",
    promptCacheKey: "k",
    serviceTier: "flex",
    unsupportedParameters: "drop",
    labels: { team: "a" },
    extraBody: { b: 1, a: [2] },
  } as const satisfies ChatOptions;
  assert.deepEqual(await sent(t, "Hi", options), {
    model: "m",
    messages: [{ role: "user", content: "Hi" }],
    params: {
      temperature: 0,
      topP: 0.5,
      topK: 5,
      minP: 0.25,
      maxCompletionTokens: 10,
      stop: ["END"],
      frequencyPenalty: 0,
      presencePenalty: -1,
      repetitionPenalty: 1.5,
      seed: "1152921504606846977",
      choiceCount: 2,
      logprobs: false,
      topLogprobs: 3,
      logitBias: { 50256: -100 },
      reasoningEffort: "low",
      enableThinking: false,
      verbosity: "high",
      parallelToolCalls: true,
    },
    tools: [
      {
        function: {
          name: "f",
          description: "d",
          parametersSchemaJson: '{"type":"object"}',
          strict: true,
        },
      },
    ],
    toolChoice: { mode: "MODE_REQUIRED" },
    responseFormat: { jsonObject: {} },
    roleTemplates: [{ role: "env", apiRole: "system", begin: "<", end: ">" }],
    endUserId: "u",
    promptCacheKey: "k",
    serviceTier: "flex",
    unsupportedParameterPolicy: "UNSUPPORTED_PARAMETER_POLICY_DROP",
    labels: { team: "a" },
    extraBodyJson: '{"b":1,"a":[2]}',
  });
});

test("null and undefined are the default", async (t) => {
  const options = { temperature: null, stop: undefined, tools: null, seed: null };
  assert.deepEqual(await sent(t, "Hi", options), {
    model: "m",
    messages: [{ role: "user", content: "Hi" }],
  });
});

test("messages: our names, the OpenAI layout, and what nobody models", async (t) => {
  const call = { id: "1", type: "function", function: { name: "f", arguments: '{"a":1}' } };
  const custom = { id: "2", type: "custom", custom: { name: "c", input: "i" } };
  const citation = {
    type: "url_citation",
    url_citation: { url: "u", start_index: 1, end_index: 2 },
  };
  const request = (await sent(t, [
    { role: "system", content: "s", name: "n" },
    { role: "assistant", content: null, tool_calls: [call, custom], reasoning_content: "why" },
    { role: "tool", tool_call_id: "1", content: "r" },
    { role: "tool", toolCallId: "2", content: "r", cache: { ttl: 5 } },
    { role: "assistant", content: "x", refusal: "no", annotations: [citation] },
  ])) as { messages: unknown };
  assert.deepEqual(request.messages, [
    { role: "system", content: "s", name: "n" },
    {
      role: "assistant",
      toolCalls: [
        { id: "1", function: { name: "f", argumentsJson: '{"a":1}' } },
        { id: "2", custom: { name: "c", input: "i" } },
      ],
      reasoning: "why",
    },
    { role: "tool", content: "r", toolCallId: "1" },
    { role: "tool", content: "r", toolCallId: "2", extraJson: '{"cache":{"ttl":5}}' },
    {
      role: "assistant",
      content: "x",
      refusal: "no",
      annotations: [{ url: "u", startOffset: 1, endOffset: 2 }],
    },
  ]);
});

test("parts: ours, and the OpenAI layout", async (t) => {
  const content = [
    "text",
    { type: "text", text: "t", cache_control: { type: "ephemeral" } },
    { type: "image", data: new Uint8Array([1, 2]), mediaType: "image/png", detail: "low" },
    { type: "image_url", image_url: { url: "https://x/y.png", detail: "high" } },
    { type: "input_audio", input_audio: { data: "AQI=", format: "wav" } },
    { type: "file", file: { file_id: "f1" } },
    { type: "file", url: "https://x/y.pdf", filename: "y.pdf" },
    { type: "video_url", video_url: "https://x/v" },
    { type: "new_kind", field: 1 },
  ];
  const request = (await sent(t, [{ role: "user", content }])) as {
    messages: { parts: unknown }[];
  };
  assert.deepEqual(request.messages[0]?.parts, [
    { text: "text" },
    { text: "t", extraJson: '{"cache_control":{"type":"ephemeral"}}' },
    { image: { data: "AQI=", mediaType: "image/png", detail: "low" } },
    { image: { url: "https://x/y.png", detail: "high" } },
    { audio: { data: "AQI=", mediaType: "audio/wav" } },
    { file: { fileId: "f1" } },
    { file: { url: "https://x/y.pdf", filename: "y.pdf" } },
    { video: { url: "https://x/v" } },
    { rawJson: '{"type":"new_kind","field":1}' },
  ]);
});

test("tools, their choice and formats in every layout", async (t) => {
  const request = (await sent(t, "x", {
    tools: [
      { type: "function", function: { name: "g" } },
      { type: "custom", custom: { name: "c", format: { type: "text" } } },
      { type: "web_search", limit: 1 },
      create(FunctionToolSchema, { name: "ready" }),
    ],
    toolChoice: { type: "function", function: { name: "g" } },
    responseFormat: { type: "json_schema", json_schema: { name: "n", schema: '{"a": 1}' } },
  })) as Record<string, unknown>;
  assert.deepEqual(request["tools"], [
    { function: { name: "g" } },
    { custom: { name: "c", formatJson: '{"type":"text"}' } },
    { rawJson: '{"type":"web_search","limit":1}' },
    { function: { name: "ready" } },
  ]);
  assert.deepEqual(request["toolChoice"], { mode: "MODE_REQUIRED", toolNames: ["g"] });
  assert.deepEqual(request["responseFormat"], {
    jsonSchema: { name: "n", schemaJson: '{"a": 1}' },
  });
  const allowed = {
    type: "allowed_tools",
    allowed_tools: { mode: "auto", tools: [{ name: "g" }] },
  };
  const other = (await sent(t, "x", { toolChoice: allowed })) as Record<string, unknown>;
  assert.deepEqual(other["toolChoice"], { mode: "MODE_AUTO", toolNames: ["g"] });
});

test("jsonSchema: a schema, one with its name, one with a type", async (t) => {
  for (const [given, expected] of [
    [{ type: "object" }, { name: "answer", schemaJson: '{"type":"object"}' }],
    [{ title: "Wetter für A" }, { name: "Wetter_f_r_A", schemaJson: '{"title":"Wetter für A"}' }],
    [
      { name: "n", schema: {} },
      { name: "n", schemaJson: "{}" },
    ],
    [
      jsonSchema({ a: 1 }, Number, { strict: true }),
      {
        name: "answer",
        schemaJson: '{"a":1}',
        strict: true,
      },
    ],
  ] as const) {
    const request = (await sent(t, "x", { jsonSchema: given })) as Record<string, unknown>;
    assert.deepEqual(request["responseFormat"], { jsonSchema: expected });
  }
});

test("a ready request is copied, and options replace its fields", async (t) => {
  const ready = create(ChatRequestSchema, {
    model: "theirs",
    messages: [{ role: "user", content: "x" }],
    params: { temperature: 1, topK: 4 },
  });
  const request = (await sent(t, ready, { temperature: 0 })) as Record<string, unknown>;
  assert.equal(request["model"], model);
  assert.deepEqual(request["params"], { temperature: 0, topK: 4 });
  assert.equal(ready.params?.temperature, 1);
});

test("a mistake is told with its place, before anything is sent", async (t) => {
  const { gateway, client } = await pair(t);
  const bytes = new Uint8Array(2);
  for (const [message, prompt, options] of [
    ["model: expected the name of a model", "x", { model: "" }],
    ["messages: expected at least one message", [], {}],
    ["messages: expected a string, a list of messages or a ChatRequest, got 5", 5, {}],
    ["messages[0]: expected an object such as", ["x"], {}],
    ['messages[0].role: expected a role such as "user"', [{ content: "x" }], {}],
    ["messages[0].content: missing", [{ role: "user" }], {}],
    ["messages[0].content[0].type: missing", [{ role: "user", content: [{ url: "x" }] }], {}],
    [
      "messages[0].content[0].mediaType: missing",
      [{ role: "user", content: [{ type: "image", data: bytes }] }],
      {},
    ],
    [
      'messages[0].content[0]: expected one of "data", "url" and "fileId"',
      [{ role: "user", content: [{ type: "image", data: bytes, url: "x" }] }],
      {},
    ],
    [
      'messages[0].content[0]: unknown key "colour"',
      [{ role: "user", content: [{ type: "image", url: "x", colour: 1 }] }],
      {},
    ],
    ["messages: holds half of a surrogate pair", "a\ud800", {}],
    [
      "messages[0].toolCalls[0].function: expected an object, got undefined",
      [{ role: "assistant", toolCalls: [{ id: "1" }] }],
      {},
    ],
    ['temperature: expected a number, got "hot"', "x", { temperature: "hot" }],
    ["topK: expected an integer, got 1.5", "x", { topK: 1.5 }],
    ["topK: 4294967296 does not fit in 32 bits", "x", { topK: 2 ** 32 }],
    ["seed: expected an integer, or a bigint beyond 2 ** 53", "x", { seed: 2 ** 60 }],
    ["seed: 18446744073709551616 does not fit in 64 bits", "x", { seed: 2n ** 64n }],
    ["logprobs: expected true or false, got 1", "x", { logprobs: 1 }],
    ["stop[1]: expected a string, got 5", "x", { stop: ["a", 5] }],
    ['logitBias: "the" is no token id', "x", { logitBias: { the: 1 } }],
    ["tools: expected a list of tools", "x", { tools: { name: "f" } }],
    ['tools[0]: unknown key "params"', "x", { tools: [{ name: "f", params: {} }] }],
    ["tools[0].name: expected a string, got undefined", "x", { tools: [{}] }],
    [
      'toolChoice: expected "auto" or "none" or "required", got "always"',
      "x",
      {
        toolChoice: "always",
      },
    ],
    ["toolChoice: expected", "x", { toolChoice: "constructor" }],
    [
      "jsonSchema, responseFormat: expected only one",
      "x",
      {
        jsonSchema: {},
        responseFormat: "text",
      },
    ],
    ["extraBody: Do not know how to serialize a BigInt", "x", { extraBody: { a: 1n } }],
    ['unknown option "maxTokens"; did you mean "maxCompletionTokens"?', "x", { maxTokens: 1 }],
    [
      'unknown option "max_completion_tokens"; did you mean "maxCompletionTokens"?',
      "x",
      {
        max_completion_tokens: 1,
      },
    ],
    ['unknown option "colour"', "x", { colour: 1 }],
    ["requestId: expected printable ASCII", "x", { requestId: "a\nb" }],
    ["requestId: expected printable ASCII", "x", { requestId: "" }],
    ['metadata: "Authorization" has its own option', "x", { metadata: { Authorization: "x" } }],
    ['metadata: "a b" is no name', "x", { metadata: { "a b": "x" } }],
    ['metadata["a-bin"]: expected a Uint8Array', "x", { metadata: { "a-bin": "x" } }],
    ['metadata["a"]: expected a string of printable', "x", { metadata: { a: "x\n" } }],
    ["timeoutMs: expected milliseconds above 0, got 0", "x", { timeoutMs: 0 }],
    ["timeoutMs: expected milliseconds above 0, got NaN", "x", { timeoutMs: Number.NaN }],
    ["signal: expected an AbortSignal", "x", { signal: {} }],
    ["options: expected an object", "x", "gpt"],
  ] as [string, unknown, unknown][]) {
    const whole = typeof options === "object" ? { model, ...options } : options;
    const told = (error: Error) => {
      assert.ok(error instanceof TypeError || error instanceof RangeError, String(error));
      assert.ok(error.message.startsWith(message), `${error.message} / ${message}`);
      return true;
    };
    await assert.rejects(client.chat(wrong(prompt), wrong(whole)), told);
    assert.throws(() => client.stream(wrong(prompt), wrong(whole)), told);
  }
  for (const [message, items, options] of [
    ["items: expected at least one", [], {}],
    ['items: expected a list of prompts, got "x"', "x", {}],
    ["items: expected a list of prompts", { messages: "x" }, {}],
    ['items[1]: expected "messages", got the keys prompt', ["x", { prompt: "x" }], {}],
    [
      "items[0]: timeoutMs: one call carries the whole batch",
      [{ messages: "x", timeoutMs: 1 }],
      {},
    ],
    ["items[0]: topK: 4294967296 does not fit", [{ messages: "x", topK: 2 ** 32 }], {}],
    ["maxConcurrency: expected an integer", ["x"], { maxConcurrency: 0.5 }],
  ] as [string, unknown, unknown][]) {
    assert.throws(
      () => client.batch(wrong(items), { model, ...wrong(options) }),
      (error: Error) => error.message.startsWith(message) || assert.fail(error.message),
    );
  }
  await assert.rejects(client.models(wrong({ model })), /unknown option "model"/);
  await assert.rejects(client.tokenize(wrong(5), { model }), /texts: expected a list of strings/);
  assert.throws(() => client.stream("x", { model, mode: wrong("all") }), /mode: expected "delta"/);
  assert.equal(gateway.calls.length, 0);
});

test("metadata goes along, bytes for -bin", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.reply("ok");
  await client.chat("x", {
    model,
    metadata: { traceparent: "00-1", "Trace-bin": new Uint8Array([0, 255]) },
  });
  const { metadata } = gateway.calls[0] ?? {};
  assert.equal(metadata?.["traceparent"], "00-1");
  assert.deepEqual(metadata?.["trace-bin"], Buffer.from([0, 255]));
});
