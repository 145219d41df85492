/** The fake gateway is what users' own tests stand on. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { FakeGateway, heartbeat, toolCall } from "tokenwire/testing";
import { create, DeltaSchema } from "tokenwire/v1";
import { all, arrived, failure, pair } from "./harness.js";

const model = "m";

test("without an answer left a call fails, and says what to do", async (t) => {
  const { client } = await pair(t);
  const error = await failure(client.chat("x", { model }));
  assert.equal(error.code, "INTERNAL");
  assert.match(error.rawMessage, /script one with reply, fail, cut or hang/);
});

test("a cut unary call, and failures after parts, are failures", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.cut("a").fail("UPSTREAM_ERROR", { after: ["a"] });
  assert.equal((await failure(client.chat("x", { model }))).reason, "UPSTREAM_STREAM_INTERRUPTED");
  assert.equal((await failure(client.chat("x", { model }))).reason, "UPSTREAM_ERROR");
});

test("each choice that began is finished once", async (t) => {
  const { gateway, client } = await pair(t);
  const second = create(DeltaSchema, { content: "b", choiceIndex: 1 });
  gateway.reply("a", second, heartbeat()).replyWith(["a"], { finishReason: "length" });
  const events = await all(client.stream("x", { model }));
  const finished = events.filter((event) => event.kind === "finish");
  assert.deepEqual(
    finished.map((event) => event.choiceIndex),
    [0, 1],
  );
  assert.equal((await client.stream("x", { model }).reply()).finishReason, "length");
});

test("calls are recorded, with who answered and who left", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.reply(toolCall("f", "{}"));
  await client.chat("x", { model, metadata: { a: "b" } });
  await client.models();
  const [chat, models] = gateway.calls;
  assert.deepEqual([chat?.method, models?.method], ["Chat", "ListModels"]);
  assert.equal(chat?.metadata["a"], "b");
  assert.equal(await chat?.waitCancelled(), false);
  assert.throws(() => models?.request, /ListModels has no ChatRequest/);
  gateway.hang();
  const call = failure(client.chat("x", { model, timeoutMs: 20_000 }));
  await arrived(gateway, 3);
  assert.equal(await gateway.calls[2]?.waitCancelled(10), false); // not yet
  await gateway.close();
  assert.ok(["UNAVAILABLE", "CANCELLED"].includes((await call).code));
});

test("two gateways share no port, and closing frees it", async () => {
  await using one = await FakeGateway.start();
  await using other = await FakeGateway.start();
  assert.notEqual(one.target, other.target);
});
