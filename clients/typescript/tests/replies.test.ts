import assert from "node:assert/strict";
import { test } from "node:test";
import { Accumulator, jsonSchema } from "tokenwire";
import { toolCall } from "tokenwire/testing";
import {
  type ChatMessage,
  create,
  type Delta,
  DeltaSchema,
  FinishReason,
  StreamChatResponseSchema,
} from "tokenwire/v1";
import { all, pair } from "./harness.js";

const model = "m";

function fold(...deltas: Delta[]): ChatMessage {
  const answer = new Accumulator();
  for (const value of deltas) {
    answer.add(create(StreamChatResponseSchema, { event: { case: "delta", value } }));
  }
  return answer.message;
}

test("tool calls are assembled: first id and name win, arguments grow, by index", () => {
  const part = (init: object) => create(DeltaSchema, { toolCalls: [init] });
  const message = fold(
    part({ index: 1, id: "b", name: "g", custom: true, arguments: "in" }),
    part({ index: 0, id: "a", name: "f", arguments: '{"x"' }),
    part({ index: 1, id: "other", name: "other", arguments: "put" }),
    part({ index: 0, arguments: ":1}" }),
  );
  assert.equal(message.content, undefined);
  assert.deepEqual(
    message.toolCalls.map(({ id, call }) => [id, call.case, call.value?.name]),
    [
      ["a", "function", "f"],
      ["b", "custom", "g"],
    ],
  );
});

test("arguments are parsed, and what is none is told", async (t) => {
  const { gateway, client } = await pair(t);
  const custom = create(DeltaSchema, {
    toolCalls: [{ index: 3, id: "c", name: "c", custom: true, arguments: "free" }],
  });
  gateway.reply(
    toolCall("f", { city: "Rom" }),
    toolCall("g", '{"ci', { id: "2", index: 1 }),
    toolCall("h", "", { id: "3", index: 2 }),
    custom,
    toolCall("l", "[1]", { id: "5", index: 4 }),
  );
  const reply = await client.chat("x", { model });
  assert.equal(reply.finishReason, "tool_calls");
  const [f, g, h, c, l] = reply.toolCalls;
  assert.deepEqual(f?.arguments, { city: "Rom" });
  assert.equal(
    f?.parse((value) => (value as { city: string }).city),
    "Rom",
  );
  assert.equal(f?.parse({ parse: (value) => Object.keys(value as object).length }), 1);
  const named = /^the arguments of the call of "g" \(2\) is not JSON: .*\{\\"ci/;
  assert.throws(() => g?.arguments, { name: "SyntaxError", message: named });
  assert.equal(g?.rawArguments, '{"ci');
  assert.deepEqual(h?.arguments, {});
  assert.deepEqual([c?.isCustom, c?.rawArguments, c?.name], [true, "free", "c"]);
  assert.throws(() => l?.arguments, /is not a JSON object: "\[1\]"/);
  assert.equal(f?.answer("text").content, "text");
  assert.equal(f?.answer({ a: 1 }).content, '{"a":1}');
  assert.equal(f?.answer(undefined).content, "null");
});

test("json answers are of the caller's type, by a function or an object that parses", async (t) => {
  const { gateway, client } = await pair(t);
  const text = '{"city":"Oslo"}';
  const schema = { type: "object" };
  gateway.reply(text).reply(text).reply(text).reply("{").reply(text);
  const plain = await client.chat<{ city: string }>("x", { model, jsonSchema: schema });
  assert.equal(plain.json().city, "Oslo");
  assert.equal(
    plain.json((value) => JSON.stringify(value)),
    text,
  );
  const city = jsonSchema(schema, (value) => (value as { city: string }).city);
  const parsed: string = (await client.chat("x", { model, jsonSchema: city })).json();
  assert.equal(parsed, "Oslo");
  const strict = jsonSchema(schema, {
    parse(value: unknown): Date {
      throw new RangeError(`no date: ${JSON.stringify(value)}`);
    },
  });
  const refused = await client.stream("x", { model, jsonSchema: strict }).reply();
  assert.throws(() => refused.json().getTime(), /no date/);
  const cut = await client.chat("x", { model, jsonSchema: city });
  const message = /^the answer \(finishReason "stop"\) is not JSON: .*: "\{"$/;
  assert.throws(() => cut.json(), { name: "SyntaxError", message });
  const stream = client.stream("x", { model, jsonSchema: city });
  await all(stream);
  assert.equal(stream.first.json(), "Oslo");
});

test("a whole answer and its deltas are the same, however they are cut", async (t) => {
  const { gateway, client } = await pair(t);
  const text = "naïve 你好 😀 e\u0301";
  const letters = [...text];
  for (const size of [1, 2, 3, letters.length]) {
    const parts: Delta[] = [];
    for (let at = 0; at < letters.length; at += size) {
      const content = letters.slice(at, at + size).join("");
      parts.push(
        create(DeltaSchema, { content, reasoning: `${at}`, logprobs: [{ token: content }] }),
      );
      const annotations = [{ url: `https://example.com/${at}` }];
      parts.push(create(DeltaSchema, { choiceIndex: 1, refusal: content, annotations }));
    }
    gateway.replyWith(parts, { usage: { totalTokens: 9, cachedPromptTokens: 0 } });
    gateway.replyWith(parts, { usage: { totalTokens: 9, cachedPromptTokens: 0 } });
    const whole = await client.chat("x", { model });
    const grown = await client.stream("x", { model }).reply();
    assert.deepEqual(grown.proto.choices, whole.proto.choices);
    assert.deepEqual(grown.usage, whole.usage);
    assert.equal(grown.usage.cachedPromptTokens, 0);
    assert.equal(grown.text, text);
    assert.equal(grown.choices[1]?.refusal, text);
    assert.deepEqual(
      grown.choices[1]?.message.annotations.map(({ url }) => url),
      parts.flatMap(({ annotations }) => annotations.map(({ url }) => url)),
    );
    assert.equal(grown.choices[0]?.proto.logprobs.map(({ token }) => token).join(""), text);
  }
});

test("fields nobody models grow as text, lists and objects do", () => {
  const extra = (value: string) => create(DeltaSchema, { extraJson: value });
  assert.equal(fold(extra('{"n": 12345678901234567890}')).extraJson, '{"n": 12345678901234567890}');
  const grown = fold(
    extra('{"a":"x","l":[1],"o":{"p":"q"}}'),
    extra("not json"),
    extra('{"a":"y","l":[2],"o":{"p":"r","__proto__":1},"n":null}'),
  );
  assert.equal(grown.extraJson, '{"a":"xy","l":[1,2],"o":{"p":"qr","__proto__":1},"n":null}');
});

test("what the trailer tells of the whole ends in the header", () => {
  const answer = new Accumulator();
  const add = (event: object) => answer.add(create(StreamChatResponseSchema, { event } as never));
  add({ case: "header", value: { model: "m", extraJson: '{"a":1}' } });
  add({ case: "finish", value: { finishReason: 77 } });
  assert.equal(answer.isComplete, false);
  add({ case: "trailer", value: { extraJson: '{"b":2}' } });
  const reply = answer.soFar("r");
  assert.equal(reply.proto.header?.extraJson, '{"a":1,"b":2}');
  assert.equal(reply.finishReason, "other"); // newer than this package
  assert.equal(reply.proto.usage, undefined); // nobody reported it
  assert.equal(reply.usage.totalTokens, 0);
});

test("the header in JavaScript's own types", () => {
  const answer = new Accumulator();
  const header = {
    createTime: { seconds: 1_700_000_000n, nanos: 5_000_000 },
    attempts: [
      {
        upstream: "a",
        httpStatus: 429,
        errorReason: 11,
        duration: { seconds: 1n, nanos: 500_000 },
      },
      { upstream: "b" },
    ],
  };
  answer.add(
    create(StreamChatResponseSchema, { event: { case: "header", value: header } as never }),
  );
  assert.deepEqual(answer.header?.createTime, new Date(1_700_000_000_005));
  assert.deepEqual(answer.header?.attempts, [
    { upstream: "a", keyId: "", httpStatus: 429, errorReason: "RATE_LIMITED", durationMs: 1000.5 },
    { upstream: "b", keyId: "", httpStatus: undefined, errorReason: "", durationMs: 0 },
  ]);
});

test("finish reasons have the contract's names", async (t) => {
  const { gateway, client } = await pair(t);
  for (const name of Object.keys(FinishReason).filter((key) => /^[A-Z]/.test(key))) {
    const finishReason = name.toLowerCase();
    if (name === "UNSPECIFIED") continue;
    gateway.replyWith(["x"], { finishReason: finishReason as "stop" });
    assert.equal((await client.chat("x", { model })).finishReason, finishReason);
  }
  assert.equal(new Accumulator().finishReason, "");
  assert.equal(new Accumulator().text, "");
});
