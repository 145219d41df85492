import assert from "node:assert/strict";
import { test } from "node:test";
import { inspect } from "node:util";
import { ChannelCredentials } from "@grpc/grpc-js";
import { Tokenwire, type TokenwireOptions } from "tokenwire";
import { FakeGateway } from "tokenwire/testing";
import { failure, pair } from "./harness.js";

const model = "m";

test("a token: a string, a function, a promise; asked once per call", async (t) => {
  const gateway = await FakeGateway.start({ token: "good-2" });
  t.after(() => gateway.close());
  let asked = 0;
  for (const [token, ok] of [
    ["good-2", true],
    ["bad", false],
    ["", false],
    [() => `good-${++asked}`, false],
    [async () => `good-${++asked}`, true],
  ] as const) {
    await using client = gateway.client({ token });
    gateway.reply("ok");
    const call = client.stream("x", { model }).reply();
    if (ok) {
      assert.equal((await call).text, "ok");
    } else {
      const error = await failure(call);
      assert.deepEqual([error.code, error.reason], ["UNAUTHENTICATED", "CALLER_UNAUTHENTICATED"]);
    }
  }
  assert.equal(asked, 2);
});

test("a supplier that throws: its own error, and nothing is sent", async (t) => {
  const broken = new Error("vault is sealed");
  const { gateway, client } = await pair(t, {
    token: () => {
      throw broken;
    },
  });
  await assert.rejects(client.chat("x", { model }), broken);
  await assert.rejects(client.stream("x", { model }).reply(), broken);
  const late = gateway.client({ token: () => Promise.reject(broken) });
  t.after(() => late.close());
  await assert.rejects(late.chat("x", { model }), broken);
  assert.equal(gateway.calls.length, 0);
});

test("a supplier that never answers: the call ends as if it ran", async (t) => {
  const { gateway, client } = await pair(t, { token: () => new Promise(() => {}) });
  const late = await failure(client.chat("x", { model, timeoutMs: 50 }));
  assert.equal(late.code, "DEADLINE_EXCEEDED");
  const slow = await failure(client.stream("x", { model, timeoutMs: 50 }).reply());
  assert.equal(slow.code, "DEADLINE_EXCEEDED");
  const controller = new AbortController();
  const waiting = failure(client.chat("x", { model, signal: controller.signal }));
  setTimeout(() => controller.abort("enough"), 10);
  const aborted = await waiting;
  assert.deepEqual([aborted.code, aborted.cause], ["CANCELLED", "enough"]);
  const left = failure(client.stream("x", { model }).reply());
  setTimeout(() => client.close(), 10);
  assert.equal((await left).code, "CANCELLED");
  assert.equal(gateway.calls.length, 0);
});

test("a token with a space or a line end is refused, and never shown", async (t) => {
  for (const token of ["secret value", "secret\n", "secrét"]) {
    const told = (error: Error) =>
      error instanceof TypeError &&
      /^token: holds/.test(error.message) &&
      !inspect(error).includes(token);
    assert.throws(() => new Tokenwire({ token }), told);
    const { client } = await pair(t, { token: () => token });
    await assert.rejects(client.chat("x", { model }), told);
  }
  const { client } = await pair(t, { token: "my-secret" });
  assert.ok(!inspect(client, { depth: 9, showHidden: true }).includes("my-secret"));
});

test("target and token come from the environment unless given", async (t) => {
  const gateway = await FakeGateway.start({ token: "from-env" });
  t.after(() => gateway.close());
  const before = { ...process.env };
  t.after(() => {
    process.env = before;
  });
  process.env["TOKENWIRE_TARGET"] = gateway.target;
  process.env["TOKENWIRE_TOKEN"] = "from-env";
  gateway.reply("ok");
  await using client = new Tokenwire();
  assert.equal((await client.chat("x", { model })).text, "ok");
  await using none = new Tokenwire({ token: "" });
  assert.equal((await failure(none.chat("x", { model }))).code, "UNAUTHENTICATED");
  delete process.env["TOKENWIRE_TARGET"];
  await using usual = new Tokenwire();
  assert.equal(usual.target, "localhost:50051");
});

test("what cannot be connected with is told at once", () => {
  const cert = "-----BEGIN CERTIFICATE-----";
  for (const [message, options] of [
    ["target: expected an address", { target: "" }],
    ["target: expected HOST:PORT, without a scheme", { target: "https://gateway:443" }],
    ["token: expected a string, got number", { token: 5 }],
    ["tls: expected true, false", { tls: "ca.pem" }],
    ['tls: unknown key "caFile"', { tls: { caFile: "x" } }],
    ["tls: expected cert and key together", { tls: { cert } }],
    ["tls.ca: expected PEM text", { tls: { ca: "/etc/ca.pem" } }],
    ["timeoutMs: expected milliseconds above 0", { timeoutMs: -1 }],
  ] as [string, unknown][]) {
    assert.throws(
      () => new Tokenwire(options as TokenwireOptions),
      (error: Error) => error.message.startsWith(message) || assert.fail(error.message),
    );
  }
});

test("credentials of grpc-js pass through", async (t) => {
  const { gateway, client } = await pair(t, { tls: ChannelCredentials.createInsecure() });
  gateway.reply("ok");
  assert.equal((await client.chat("x", { model })).text, "ok");
});

test("channel options replace the built-in ones", async (t) => {
  const { gateway, client } = await pair(t, {
    channelOptions: { "grpc.enable_retries": 0, "grpc.primary_user_agent": "mine" },
  });
  gateway.fail("GATEWAY_OVERLOADED", { pushbackMs: 1 }).reply("ok");
  assert.equal((await failure(client.chat("x", { model }))).reason, "GATEWAY_OVERLOADED");
  assert.match(String(gateway.calls[0]?.metadata["user-agent"]), /^mine /);
});
