import assert from "node:assert/strict";
import {
  constants,
  createServer,
  type IncomingHttpHeaders,
  type ServerHttp2Session,
  type ServerHttp2Stream,
} from "node:http2";
import type { AddressInfo } from "node:net";
import { type TestContext, test } from "node:test";
import { type ChatStream, type Message, Tokenwire } from "tokenwire";
import { FakeGateway, heartbeat, toolCall } from "tokenwire/testing";
import {
  BatchChatRequestSchema,
  BatchChatResponseSchema,
  ChatRequestSchema,
  CountTokensRequestSchema,
  create,
  DeltaSchema,
  ListModelsResponseSchema,
  StreamChatRequestSchema,
  StreamChatResponseSchema,
  TokenizeResponseSchema,
  toBinary,
} from "tokenwire/v1";
import { all, arrived, failure, pair } from "./harness.js";

const model = "m";

test("chat: text, usage, header, finish reason, request id", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.reply("Hello", " world");
  const reply = await client.chat("Hi there", { model, requestId: "r-1" });
  assert.equal(reply.text, "Hello world");
  assert.equal(reply.finishReason, "stop");
  assert.equal(reply.usage.totalTokens, 4);
  assert.equal(reply.usage.cachedPromptTokens, undefined);
  assert.equal(reply.header.upstream, "fake");
  assert.equal(reply.header.maxCompletionTokens, undefined);
  assert.equal(reply.requestId, "r-1");
  assert.equal(reply.proto.choices.length, 1);
  assert.equal(gateway.calls[0]?.metadata["x-request-id"], "r-1");
  assert.match(String(gateway.calls[0]?.metadata["user-agent"]), /^tokenwire-typescript\/\d/);
});

test("a request id is made up, and is another each time", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.reply("a").reply("b");
  const [a, b] = [await client.chat("1", { model }), await client.chat("2", { model })];
  assert.match(a.requestId, /^[0-9a-f]{32}$/);
  assert.notEqual(a.requestId, b.requestId);
  assert.equal(gateway.calls[1]?.metadata["x-request-id"], b.requestId);
});

test("a conversation goes on with replies, stream messages and plain objects", async (t) => {
  const { gateway, client } = await pair(t);
  gateway
    .reply(toolCall("weather", { city: "Rome" }))
    .reply("It is", " warm.")
    .reply("Yes.");
  const turns: Message[] = [{ role: "user", content: "Rome?" }];
  const first = await client.chat(turns, { model });
  turns.push(first, ...first.toolCalls.map((call) => call.answer({ degrees: 21 })));
  const stream = client.stream(turns, { model });
  await all(stream);
  turns.push(stream.message, { role: "user", content: "Sure?" });
  await client.chat(turns, { model });
  const [user, assistant, tool, told] = gateway.calls[2]?.request.messages ?? [];
  assert.equal(user?.content, "Rome?");
  assert.equal(assistant?.content, undefined);
  assert.equal(assistant?.toolCalls[0]?.call.value?.name, "weather");
  assert.deepEqual(
    [tool?.role, tool?.toolCallId, tool?.content],
    ["tool", "call_1", '{"degrees":21}'],
  );
  assert.equal(told?.content, "It is warm.");
});

test("a stream tells its events, keeps the answer so far, and ends as chat does", async (t) => {
  const { gateway, client } = await pair(t);
  const parts = ["Once", heartbeat(), "", " upon", create(DeltaSchema, { reasoning: "hm" })];
  gateway.reply(...parts).reply(...parts);
  const stream = client.stream("A story", { model });
  assert.equal(stream.header, undefined);
  const kinds: string[] = [];
  let text = "";
  for await (const event of stream) {
    kinds.push(event.kind);
    text += event.text;
    assert.equal(stream.text, text);
  }
  assert.deepEqual(kinds, ["header", "delta", "delta", "delta", "delta", "finish", "trailer"]);
  assert.ok(stream.isComplete);
  assert.equal(stream.reasoning, "hm");
  assert.equal(stream.usage?.completionTokens, 2);
  assert.ok((stream.timeToFirstTokenMs ?? -1) >= 0);
  stream.cancel(); // nothing, now
  const reply = await stream.reply();
  const whole = await client.chat("A story", { model });
  assert.deepEqual(reply.proto.choices, whole.proto.choices);
  assert.deepEqual(reply.usage, whole.usage);
});

test("events nobody knows are skipped", async (t) => {
  const { gateway, client } = await pair(t);
  const unknown = create(StreamChatResponseSchema);
  unknown.$unknown = [{ no: 99, wireType: 2, data: new Uint8Array([1, 65]) }];
  gateway.reply("a", unknown, "b");
  assert.equal((await client.stream("x", { model }).reply()).text, "ab");
});

test("only the text, of one choice", async (t) => {
  const { gateway, client } = await pair(t);
  const other = create(DeltaSchema, { content: "B", choiceIndex: 1 });
  gateway.reply("a", other, "c").reply("a", other, "c");
  assert.deepEqual(await all(client.stream("x", { model }).textDeltas()), ["a", "c"]);
  const second = client.stream("x", { model });
  assert.deepEqual(await all(second.textDeltas(1)), ["B"]);
  assert.deepEqual(
    (await second.reply()).choices.map((choice) => choice.text),
    ["ac", "B"],
  );
});

test("cumulative: events tell what is new, the stream has the whole", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.reply("Once", " upon", toolCall("f", "{}"));
  const stream = client.stream("x", { model, mode: "cumulative", maxDelayMs: 1500 });
  const events = await all(stream);
  assert.deepEqual(
    events.filter((event) => event.kind === "snapshot").map((event) => event.text),
    ["Once", " upon", ""],
  );
  assert.equal((await stream.reply()).text, "Once upon");
  assert.equal(stream.toolCalls[0]?.name, "f");
  const { maxDelay, mode } = gateway.calls[0]?.as(StreamChatRequestSchema) ?? {};
  assert.deepEqual([maxDelay?.seconds, maxDelay?.nanos, mode], [1n, 500_000_000, 2]);
});

test("OK without the trailer is an error, with what had arrived", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.cut("half an ans").cut();
  const stream = client.stream("x", { model, requestId: "r" });
  const error = await failure(all(stream));
  assert.deepEqual([error.code, error.reason], ["INTERNAL", "STREAM_INCOMPLETE"]);
  assert.deepEqual([error.partialText, error.requestId], ["half an ans", "r"]);
  assert.equal(error.isRetryable, false);
  assert.equal(await failure(stream.reply()), error);
  assert.equal((await failure(client.stream("x", { model }).reply())).partialText, "");
});

test("an interrupted stream: every delta before the error, then the error", async (t) => {
  const { gateway, client } = await pair(t);
  const deltas = Array.from({ length: 100 }, (_, i) => `${i} `);
  gateway.fail("UPSTREAM_STREAM_INTERRUPTED", { after: deltas, metadata: { attempts: "2" } });
  const stream = client.stream("x", { model });
  const seen: string[] = [];
  const error = await failure(
    (async () => {
      for await (const text of stream.textDeltas()) {
        seen.push(text);
        // So slow that the status is there before the messages are read.
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
    })(),
  );
  assert.deepEqual(seen, deltas);
  assert.equal(error.reason, "UPSTREAM_STREAM_INTERRUPTED");
  assert.equal(error.partialText, deltas.join(""));
  assert.equal(error.attempts, 2);
  assert.equal(stream.isComplete, false);
});

test("a reader that is far behind gets all that came before the error", async (t) => {
  const { gateway, client } = await pair(t);
  const deltas = Array.from({ length: 48 }, (_, i) => String(i).padEnd(64 * 1024, "."));
  gateway.fail("UPSTREAM_STREAM_INTERRUPTED", { after: deltas });
  const stream = client.stream("x", { model });
  let read = 0;
  const error = await failure(
    (async () => {
      for await (const text of stream.textDeltas()) {
        assert.equal(text, deltas[read]);
        read += 1;
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    })(),
  );
  assert.equal(read, deltas.length);
  assert.equal(error.reason, "UPSTREAM_STREAM_INTERRUPTED");
  assert.equal(error.partialText.length, 48 * 64 * 1024);
});

test("a caller who reads nothing is felt by the gateway", async (t) => {
  const server = createServer();
  let written = 0;
  const blocked = new Promise<ServerHttp2Stream>((resolve) => {
    server.on("stream", async (stream) => {
      stream.on("error", () => {});
      stream.respond({ ":status": 200, "content-type": "application/grpc" });
      const event = create(StreamChatResponseSchema, {
        event: { case: "delta", value: { content: "x".repeat(1024 * 1024) } },
      });
      const bytes = toBinary(StreamChatResponseSchema, event);
      const head = Buffer.alloc(5);
      head.writeUInt32BE(bytes.length, 1);
      for (;;) {
        const message = Buffer.concat([head, bytes]);
        const taken = new Promise<boolean>((done) => stream.write(message, () => done(true)));
        const late = new Promise<boolean>((done) => setTimeout(done, 1000, false));
        if (!(await Promise.race([taken, late]))) break;
        written += 1;
        if (written > 100) break;
      }
      resolve(stream);
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  const client = new Tokenwire({ target: `127.0.0.1:${port}`, token: "" });
  const stream = client.stream("x", { model });
  const sent = await blocked;
  t.after(() => {
    sent.session?.destroy();
    server.close();
  });
  // 4 MiB are read ahead, and grpc-js has 16 messages of its own.
  assert.ok(written >= 4 && written < 40, `${written} MiB`);
  for await (const _ of stream) break;
  client.close();
});

test("the time to the first token counts text, reasoning, refusals and tool calls", async (t) => {
  const { gateway, client } = await pair(t);
  for (const part of [
    "a",
    create(DeltaSchema, { reasoning: "hm" }),
    create(DeltaSchema, { refusal: "no" }),
    toolCall("f", {}),
  ]) {
    gateway.hang(create(DeltaSchema), part);
    const stream = client.stream("x", { model });
    const times: (number | undefined)[] = [];
    for await (const _ of stream) {
      times.push(stream.timeToFirstTokenMs);
      if (times.length === 3) break; // after the header and the empty delta
    }
    assert.deepEqual(times.slice(0, 2), [undefined, undefined]);
    assert.ok(Number(times[2]) >= 0);
  }
});

test("who leaves a stream gets nothing more of it, though it be there", async (t) => {
  const { gateway, client } = await pair(t);
  const leave: [string, (stream: ChatStream, controller: AbortController) => void][] = [
    ["cancel", (stream) => stream.cancel()],
    ["abort", (_, controller) => controller.abort("enough")],
    ["close", () => client.close()],
  ];
  for (const whole of [true, false]) gateway[whole ? "reply" : "hang"]("one", "two", "three");
  gateway.hang("one", "two", "three");
  for (const [kind, act] of leave) {
    const controller = new AbortController();
    const stream = client.stream("x", { model, signal: controller.signal });
    const seen: string[] = [];
    const error = await failure(
      (async () => {
        for await (const text of stream.textDeltas()) {
          seen.push(text);
          await new Promise((resolve) => setTimeout(resolve, 100)); // the others arrive
          act(stream, controller);
        }
      })(),
    );
    assert.deepEqual([kind, seen, error.code], [kind, ["one"], "CANCELLED"]);
    assert.equal(error.cause, kind === "abort" ? "enough" : undefined);
    assert.equal(error.partialText, "one");
    assert.equal(stream.text, "one");
  }
});

for (const [how, leave] of [
  [
    "break",
    async (stream: AsyncIterable<unknown>) => {
      for await (const _ of stream) break;
    },
  ],
  [
    "an exception",
    async (stream: AsyncIterable<unknown>) => {
      const thrown = new Error("mine");
      await assert.rejects(
        (async () => {
          for await (const _ of stream) throw thrown;
        })(),
        thrown,
      );
    },
  ],
] as const) {
  test(`leaving the loop by ${how} cancels the call`, async (t) => {
    const { gateway, client } = await pair(t);
    gateway.hang("one");
    const stream = client.stream("x", { model });
    await leave(stream);
    assert.equal(await gateway.calls[0]?.waitCancelled(), true);
    await assert.rejects(stream.reply(), /not read to its end/);
    assert.throws(() => stream[Symbol.asyncIterator](), /only once/);
  });
}

test("leaving the loop over the text cancels, too, and so does leaving a batch", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.hang("one");
  const stream = client.stream("x", { model });
  for await (const _ of stream.textDeltas()) break;
  assert.equal(stream.text, "one");
  assert.equal(await gateway.calls[0]?.waitCancelled(), true);
  gateway.hang().reply("two");
  for await (const result of client.batch(["1", "2"], { model })) {
    assert.equal(result.unwrap().text, "two");
    break;
  }
  assert.equal(await gateway.calls[1]?.waitCancelled(), true);
});

test("a loop that is left before it began, or while it waits, cancels as well", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.hang().hang().hang("one");
  const events = client.stream("x", { model })[Symbol.asyncIterator]();
  await arrived(gateway, 1);
  await events.return?.();
  const texts = client.stream("x", { model }).textDeltas();
  await arrived(gateway, 2);
  await texts.return?.();
  const waiting = client.stream("x", { model })[Symbol.asyncIterator]();
  while ((await waiting.next()).value?.text !== "one");
  const next = assert.rejects(waiting.next(), { code: "CANCELLED" });
  await waiting.return?.();
  await next;
  for (const call of gateway.calls) assert.equal(await call.waitCancelled(), true);
});

test("a stream in a block is cancelled at its end", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.hang("one");
  {
    await using stream = client.stream("x", { model });
    const loop = stream[Symbol.asyncIterator]();
    await loop.next();
  }
  assert.equal(await gateway.calls[0]?.waitCancelled(), true);
});

test("cancel() ends a loop that waits", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.hang("one");
  const stream = client.stream("x", { model });
  const error = await failure(
    (async () => {
      for await (const event of stream) if (event.text) setTimeout(() => stream.cancel(), 10);
    })(),
  );
  assert.deepEqual([error.code, error.partialText], ["CANCELLED", "one"]);
  assert.equal(await gateway.calls[0]?.waitCancelled(), true);
});

test("a signal cancels a call of each kind; its reason is the cause", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.hang().hang("one").hang();
  let calls = 0;
  for (const [kind, call] of [
    ["chat", (signal: AbortSignal) => client.chat("x", { model, signal })],
    ["stream", (signal: AbortSignal) => client.stream("x", { model, signal }).reply()],
    ["batch", (signal: AbortSignal) => client.batchOrdered(["x"], { model, signal })],
  ] as const) {
    const controller = new AbortController();
    const failed = failure(call(controller.signal));
    calls += 1;
    await arrived(gateway, calls);
    controller.abort("enough");
    const error = await failed;
    assert.deepEqual([kind, error.code, error.cause], [kind, "CANCELLED", "enough"]);
    assert.equal(error.isRetryable, false);
    assert.equal(await gateway.calls.at(-1)?.waitCancelled(), true);
  }
});

test("a signal that is aborted already sends nothing", async (t) => {
  const { gateway, client } = await pair(t);
  const signal = AbortSignal.abort(new Error("before"));
  const error = await failure(client.chat("x", { model, signal }));
  assert.equal((error.cause as Error).message, "before");
  assert.equal((await failure(client.stream("x", { model, signal }).reply())).code, "CANCELLED");
  assert.equal(gateway.calls.length, 0);
});

test("a signal keeps nothing of the calls it has outlived", async (t) => {
  const { gateway, client } = await pair(t);
  const { signal } = new AbortController();
  const listeners = new Set<unknown>();
  t.mock.method(signal, "addEventListener", (_: string, listener: unknown) => {
    listeners.add(listener);
  });
  t.mock.method(signal, "removeEventListener", (_: string, listener: unknown) => {
    listeners.delete(listener);
  });
  gateway
    .reply("a")
    .reply("b")
    .fail("INTERNAL")
    .fail("INTERNAL", { after: ["c"] });
  await client.chat("x", { model, signal });
  await client.stream("x", { model, signal }).reply();
  await failure(client.chat("x", { model, signal }));
  assert.equal(listeners.size, 0);
  await failure(client.stream("x", { model, signal }).reply());
  assert.equal(listeners.size, 0);
  // The whole of it is there, and more of it than is read ahead.
  gateway.reply(...Array.from({ length: 12 }, () => "x".repeat(1024 * 1024)));
  for await (const _ of client.stream("x", { model, signal })) {
    await gateway.calls.at(-1)?.waitCancelled();
    await new Promise((resolve) => setTimeout(resolve, 200));
    break;
  }
  assert.equal(listeners.size, 0);
});

test("a deadline: the caller's own, or the client's for unary calls alone", async (t) => {
  const { gateway, client } = await pair(t, { timeoutMs: 300 });
  gateway.hang("one").hang("one");
  assert.equal((await failure(client.chat("x", { model }))).code, "DEADLINE_EXCEEDED");
  const stream = await failure(client.stream("x", { model, timeoutMs: 2000 }).reply());
  assert.deepEqual([stream.code, stream.partialText], ["DEADLINE_EXCEEDED", "one"]);
  for (const call of gateway.calls) assert.equal(await call.waitCancelled(), true);
});

test("calls with one answer have 600 s unless told otherwise, streams and batches no limit", async (t) => {
  const seen: IncomingHttpHeaders[] = [];
  const client = await odd(t, {}, seen);
  const own = { model, timeoutMs: 5000 };
  const none = { model, timeoutMs: Number.POSITIVE_INFINITY };
  // They all fail, as the gateway says nothing.
  const one = [
    (options: { model: string }) => client.chat("x", options),
    (options: { model: string }) => client.countTokens("x", options),
    (options: { model: string }) => client.tokenize("x", options),
    ({ model: _, ...options }: { model: string }) => client.models(options),
    ({ model: _, ...options }: { model: string }) => client.model("x", options),
  ];
  const many = [
    (options: { model: string }) => client.stream("x", options).reply(),
    (options: { model: string }) => client.batchOrdered(["x"], options),
  ];
  for (const options of [{ model }, own, none]) {
    for (const call of [...one, ...many]) await failure(call(options));
  }
  const limits = seen.map((headers) => seconds(headers["grpc-timeout"]));
  const calls = one.length + many.length;
  for (const limit of limits.slice(0, one.length)) assert.ok(limit > 590 && limit <= 600);
  assert.deepEqual(limits.slice(one.length, calls), [Infinity, Infinity]);
  for (const limit of limits.slice(calls, 2 * calls)) assert.ok(limit > 0 && limit <= 5);
  assert.deepEqual(limits.slice(2 * calls), Array(calls).fill(Infinity));
});

/** Of the header `grpc-timeout`; Infinity where there is none. */
function seconds(timeout: string | string[] | undefined): number {
  if (typeof timeout !== "string") return Number.POSITIVE_INFINITY;
  const unit = { H: 3600, M: 60, S: 1, m: 1e-3, u: 1e-6, n: 1e-9 }[timeout.at(-1) ?? ""];
  return Number(timeout.slice(0, -1)) * (unit ?? Number.NaN);
}

test("close ends what runs; later calls say why they cannot be", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.hang().hang("one");
  const chat = failure(client.chat("x", { model }));
  const stream = failure(client.stream("x", { model }).reply());
  await arrived(gateway, 2);
  client.close();
  assert.deepEqual([(await chat).code, (await stream).code], ["CANCELLED", "CANCELLED"]);
  for (const call of gateway.calls) assert.equal(await call.waitCancelled(), true);
  await assert.rejects(client.chat("x", { model }), /the client is closed/);
  await assert.rejects(client.stream("x", { model }).reply(), /the client is closed/);
});

test("a stream that nobody reads is no unhandled rejection", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.fail("INTERNAL");
  client.stream("x", { model });
  client.stream("x", { model, signal: AbortSignal.abort() });
  await arrived(gateway, 1);
  await new Promise((resolve) => setTimeout(resolve, 20));
});

// --- batches --------------------------------------------------------------------------

test("batch: each as it is ready, ordered on wish, one failure fails no other", async (t) => {
  const { gateway, client } = await pair(t);
  const script = () =>
    gateway.reply("one").fail("CONTENT_FILTERED", { message: "no" }).reply("three");
  const items = [
    "1",
    { messages: "2", customId: "two", temperature: 0 },
    create(ChatRequestSchema, {
      messages: [{ role: "user", content: "3" }],
    }),
  ];
  script();
  const results = await all(client.batch(items, { model, maxConcurrency: 2, topK: 3 }));
  assert.deepEqual(
    results.map((result) => result.index),
    [2, 1, 0],
  );
  script();
  const ordered = await client.batchOrdered(items, { model });
  assert.deepEqual(
    ordered.map((result) => result.reply?.text),
    ["one", undefined, "three"],
  );
  assert.deepEqual(
    ordered.map((result) => result.customId),
    ["", "two", ""],
  );
  const error = ordered[1]?.error;
  assert.deepEqual([error?.reason, error?.code], ["CONTENT_FILTERED", "INVALID_ARGUMENT"]);
  assert.throws(() => ordered[1]?.unwrap(), error);
  const request = gateway.calls[0]?.as(BatchChatRequestSchema);
  assert.ok(request);
  assert.equal(request.maxConcurrency, 2);
  assert.deepEqual(
    request.items.map(({ chat }) => chat?.model),
    [model, model, model],
  );
  assert.deepEqual(
    request.items.map(({ chat }) => chat?.params?.topK),
    [3, 3, undefined],
  );
  assert.equal(request.items[1]?.chat?.params?.temperature, 0);
});

test("a batch that fails as a whole: what had arrived has been paid for", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.hang().reply("two");
  const results = await client.batchOrdered(["1", "2"], { model, timeoutMs: 2000 });
  assert.equal(results[0]?.error?.code, "DEADLINE_EXCEEDED");
  assert.equal(results[1]?.unwrap().text, "two");
  gateway.hang();
  const error = await failure(client.batchOrdered(["1"], { model, timeoutMs: 200 }));
  assert.equal(error.code, "DEADLINE_EXCEEDED");
});

test("an aborted batch is no batch", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.hang().reply("two");
  const controller = new AbortController();
  const batch = client.batch(["1", "2"], { model, signal: controller.signal });
  const ordered = failure(batch.ordered());
  setTimeout(() => controller.abort(), 200);
  assert.equal((await ordered).code, "CANCELLED");
});

// --- OKs that are none ----------------------------------------------------------------

/**
 * A client of a gateway that answers each method of `answers` with these messages and OK, or silence
 * where there is a `left`, and writes down the headers of each call.
 */
async function odd(
  t: TestContext,
  answers: Record<string, Uint8Array[]>,
  seen: IncomingHttpHeaders[] = [],
  left?: (rstCode: number | undefined) => void,
): Promise<Tokenwire> {
  const server = createServer();
  const sessions: ServerHttp2Session[] = [];
  server.on("session", (session) => sessions.push(session));
  server.on("stream", (stream, headers) => {
    seen.push(headers);
    const head = { ":status": 200, "content-type": "application/grpc" };
    stream.respond(head, { waitForTrailers: true });
    stream.on("wantTrailers", () => stream.sendTrailers({ "grpc-status": "0" }));
    for (const message of answers[String(headers[":path"]).split("/").at(-1) ?? ""] ?? []) {
      const frame = Buffer.alloc(5);
      frame.writeUInt32BE(message.length, 1);
      stream.write(Buffer.concat([frame, message]));
    }
    // Whoever waits to hear of the caller leaving has the stream go on until then.
    if (left === undefined) stream.end();
    else stream.on("close", () => left(stream.rstCode));
    stream.on("error", () => {});
    stream.resume();
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const client = new Tokenwire({ target: `127.0.0.1:${(server.address() as AddressInfo).port}` });
  t.after(() => {
    client.close();
    for (const session of sessions) session.destroy();
    server.close();
  });
  return client;
}

test("batch results of no item, or two of one, are refused", async (t) => {
  for (const indexes of [[0, 2], [0, -1], [1, 1, 0], [7], [0, 1, 1]]) {
    const BatchChat = indexes.map((index) =>
      toBinary(
        BatchChatResponseSchema,
        create(BatchChatResponseSchema, { index, result: { case: "response", value: {} } }),
      ),
    );
    const client = await odd(t, { BatchChat });
    const error = await failure(all(client.batch(["a", "b"], { model })));
    assert.deepEqual([error.code, error.reason], ["INTERNAL", "STREAM_INCOMPLETE"], `${indexes}`);
    const ordered = await failure(client.batchOrdered(["a", "b"], { model }));
    assert.equal(ordered.reason, "STREAM_INCOMPLETE", `${indexes}`);
  }
});

test("a batch that is refused here ends there", { timeout: 20_000 }, async (t) => {
  const result = create(BatchChatResponseSchema, {
    index: 2,
    result: { case: "response", value: {} },
  });
  const BatchChat = [toBinary(BatchChatResponseSchema, result)];
  let left: (rstCode: number | undefined) => void = () => {};
  const rstCode = new Promise<number | undefined>((resolve) => {
    left = resolve;
  });
  const client = await odd(t, { BatchChat }, [], left);
  assert.equal((await failure(all(client.batch(["a", "b"], { model })))).code, "INTERNAL");
  assert.equal(await rstCode, constants.NGHTTP2_CANCEL);
});

test("an OK that lacks what was asked for is an error", async (t) => {
  const lists = create(TokenizeResponseSchema, { lists: [{}] });
  const page = create(ListModelsResponseSchema, { nextPageToken: "again" });
  const client = await odd(t, {
    Tokenize: [toBinary(TokenizeResponseSchema, lists)],
    ListModels: [toBinary(ListModelsResponseSchema, page)],
    GetModel: [new Uint8Array()],
  });
  const fewer = await failure(client.tokenize(["a", "b"], { model }));
  assert.match(fewer.message, /tokens of 1 of 2 texts/);
  assert.equal((await failure(client.models())).reason, "STREAM_INCOMPLETE");
  assert.equal((await failure(client.model("m"))).reason, "STREAM_INCOMPLETE");
});

// --- tokens and models ----------------------------------------------------------------

test("tokens are counted of a text or a conversation, and listed", async (t) => {
  const { gateway, client } = await pair(t);
  const count = await client.countTokens("How many tokens?", { model });
  assert.deepEqual(count, { totalTokens: 3, tokenizer: "words", exact: false });
  await client.countTokens([{ role: "user", content: "a b" }], { model });
  await client.countTokens("a b", { model, tools: [{ name: "f" }] });
  const inputs = gateway.calls.map((call) => call.as(CountTokensRequestSchema).input.case);
  assert.deepEqual(inputs, ["text", "chat", "chat"]);
  const lists = await client.tokenize(["a bc", ""], { model });
  assert.deepEqual(
    lists.map(({ ids }) => ids),
    [[0, 1], []],
  );
  assert.deepEqual(lists[0]?.pieces[1], new Uint8Array([98, 99]));
});

test("models come from all pages", async (t) => {
  const models = Array.from({ length: 250 }, (_, i) => `m${i}`);
  const { gateway, client } = await pair(t, {}, { models });
  assert.deepEqual(
    (await client.models()).map(({ name }) => name),
    models,
  );
  assert.equal(gateway.calls.length, 3);
  const one = await client.model("m7");
  assert.deepEqual([one.name, one.upstream, one.contextWindowTokens], ["m7", "fake", undefined]);
  const error = await failure(client.model("none"));
  assert.deepEqual([error.code, error.reason], ["NOT_FOUND", "MODEL_NOT_FOUND"]);
});

// --- retries --------------------------------------------------------------------------

for (const [kind, call] of [
  ["chat", (client: Tokenwire) => client.chat("x", { model })],
  ["stream", (client: Tokenwire) => client.stream("x", { model }).reply()],
] as const) {
  test(`${kind}: UNAVAILABLE is tried again, three times in all`, async (t) => {
    const { gateway, client } = await pair(t);
    gateway.fail("GATEWAY_OVERLOADED", { pushbackMs: 10 }).fail("GATEWAY_DRAINING").reply("ok");
    assert.equal((await call(client)).text, "ok");
    assert.equal(gateway.calls.length, 3);
    assert.equal(gateway.calls[2]?.metadata["grpc-previous-rpc-attempts"], "2");
    for (let i = 0; i < 4; i += 1) gateway.fail("GATEWAY_OVERLOADED", { pushbackMs: 1 });
    const error = await failure(call(client));
    assert.equal(error.reason, "GATEWAY_OVERLOADED");
    assert.equal(gateway.calls.length, 6);
  });

  test(`${kind}: not against pushback, nor for any other code`, async (t) => {
    const { gateway, client } = await pair(t);
    gateway.fail("UPSTREAM_ERROR").fail("RATE_LIMITED", { retryAfterMs: 1 });
    const error = await failure(call(client));
    assert.deepEqual([error.reason, error.isRetryable], ["UPSTREAM_ERROR", true]);
    assert.equal((await failure(call(client))).reason, "RATE_LIMITED");
    assert.equal(gateway.calls.length, 2);
  });
}

test("pushback is waited for", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.fail("GATEWAY_OVERLOADED", { pushbackMs: 700 }).reply("ok");
  const began = performance.now();
  await client.chat("x", { model });
  assert.ok(performance.now() - began >= 690);
});

test("when most calls fail, retries stop feeding the fire", async (t) => {
  const { gateway, client } = await pair(t);
  for (let i = 0; i < 300; i += 1) gateway.fail("GATEWAY_OVERLOADED", { pushbackMs: 1 });
  for (let i = 0; i < 100; i += 1) await failure(client.chat("x", { model }));
  // Half of the throttle's hundred tokens.
  assert.ok(gateway.calls.length > 130 && gateway.calls.length < 160, `${gateway.calls.length}`);
});

test("calls go to each replica in turn", async (t) => {
  const { gateway: one } = await pair(t);
  const { gateway: other } = await pair(t);
  const target = `ipv4:${one.target},${other.target}`;
  await using client = new Tokenwire({ target, token: "" });
  for (let i = 0; i < 500; i += 1) {
    one.reply("one");
    other.reply("other");
  }
  // Until both are connected with, one answers for both.
  const answers = new Set<string>();
  for (let i = 0; i < 500 && answers.size < 2; i += 1) {
    answers.add((await client.chat("x", { model })).text);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  assert.deepEqual([...answers].sort(), ["one", "other"]);
});

test("a stream that has begun is never tried again", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.fail("GATEWAY_DRAINING", { after: ["one"] }).reply("no");
  assert.equal((await failure(client.stream("x", { model }).reply())).partialText, "one");
  assert.equal(gateway.calls.length, 1);
});

test("nobody listens: UNAVAILABLE, without a reason, and to be tried again", async () => {
  const gateway = await FakeGateway.start();
  await gateway.close();
  await using client = gateway.client();
  const error = await failure(client.chat("x", { model }));
  assert.deepEqual([error.code, error.reason, error.isRetryable], ["UNAVAILABLE", "", true]);
  assert.notEqual(error.requestId, "");
});

test("10 MB go both ways, are tried again, and 40 MB are refused here", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.fail("GATEWAY_OVERLOADED", { pushbackMs: 1 }).reply("ok");
  const prompt = "a".repeat(10_000_000);
  assert.equal((await client.chat(prompt, { model })).text, "ok");
  assert.equal(gateway.calls[1]?.request.messages[0]?.content?.length, prompt.length);
  gateway.reply(prompt).reply(prompt);
  assert.equal((await client.chat("x", { model })).text, prompt);
  assert.equal((await client.stream("x", { model }).reply()).text, prompt);
  const error = await failure(client.chat(prompt.repeat(4), { model }));
  assert.equal(error.code, "RESOURCE_EXHAUSTED");
  assert.equal(error.isRetryable, false);
  assert.equal(gateway.calls.length, 4);
});
