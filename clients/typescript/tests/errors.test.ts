import assert from "node:assert/strict";
import { createServer } from "node:http2";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import { inspect } from "node:util";
import { BinaryWriter } from "@bufbuild/protobuf/wire";
import { Tokenwire, TokenwireError } from "tokenwire";
import { CODES, type Reason } from "tokenwire/testing";
import { ErrorReason } from "tokenwire/v1";
import { failure, pair } from "./harness.js";

const model = "m";

test("every detail of an error is a property, and its message tells them", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.fail("RATE_LIMITED", {
    message: "every key is rate limited",
    retryAfterMs: 12_500,
    metadata: { attempts: "2", upstream: "openai", requestId: "theirs" },
  });
  const error = await failure(client.chat("x", { model, requestId: "mine" }));
  assert.ok(error instanceof Error);
  assert.equal(error.name, "TokenwireError");
  assert.equal(error.code, "RESOURCE_EXHAUSTED");
  assert.equal(error.reason, "RATE_LIMITED");
  assert.equal(error.rawMessage, "every key is rate limited");
  assert.equal(error.retryAfterMs, 12_500);
  assert.equal(error.requestId, "theirs");
  assert.equal(error.attempts, 2);
  assert.equal(error.metadata["upstream"], "openai");
  assert.equal(error.isRetryable, true);
  assert.equal(error.partial, undefined);
  assert.equal(error.partialText, "");
  assert.equal(error.proto.details.length, 2);
  assert.equal(
    error.message,
    "RATE_LIMITED: every key is rate limited (retry after 12.5 s, 2 attempts, request theirs)",
  );
  assert.match(error.stack ?? "", /errors\.test/); // where the call was made
  assert.doesNotMatch(inspect(error), /\$typeName/);
});

test("field violations are told once", async (t) => {
  const { gateway, client } = await pair(t);
  const fieldViolations = { "params.temperature": "got 3", "messages[0].role": "got wizard" };
  const message = "params.temperature: got 3";
  gateway.fail("INVALID_REQUEST", { message, fieldViolations });
  const error = await failure(client.chat("x", { model, requestId: "r" }));
  assert.deepEqual(error.fieldViolations, [
    { field: "params.temperature", description: "got 3" },
    { field: "messages[0].role", description: "got wizard" },
  ]);
  assert.equal(
    error.message,
    `INVALID_REQUEST: ${message} (request r)\n  messages[0].role: got wizard`,
  );
  assert.equal(error.isRetryable, false);
});

test("each reason has its code, and both say whether to try again", async (t) => {
  const { gateway, client } = await pair(t);
  const names = Object.keys(ErrorReason).filter((name) => Number.isNaN(Number(name)));
  assert.deepEqual(Object.keys(CODES).sort(), names.filter((n) => n !== "UNSPECIFIED").sort());
  for (const [reason, code] of Object.entries(CODES)) {
    gateway.fail(reason as Reason, { pushbackMs: -1 });
    const error = await failure(client.chat("x", { model }));
    assert.deepEqual([error.reason, error.code], [reason, code]);
    assert.equal(error.isRetryable, code === "UNAVAILABLE", reason);
  }
});

test("what is exhausted is to be tried again only when told when", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.fail("RATE_LIMITED").fail("RATE_LIMITED", { pushbackMs: 300 });
  const never = await failure(client.chat("x", { model }));
  assert.deepEqual([never.retryAfterMs, never.isRetryable], [undefined, false]);
  // Pushback stands in for a RetryInfo that is not there.
  const later = await failure(client.chat("x", { model }));
  assert.deepEqual([later.retryAfterMs, later.isRetryable], [300, true]);
});

test("a status of somebody else has no reason", async (t) => {
  const { gateway, client } = await pair(t);
  gateway.fail("", { code: "PERMISSION_DENIED", message: "proxy says no" });
  const error = await failure(client.chat("x", { model, requestId: "r" }));
  assert.deepEqual([error.code, error.reason], ["PERMISSION_DENIED", ""]);
  assert.equal(error.message, "PERMISSION_DENIED: proxy says no (request r)");
  assert.equal(error.attempts, 0);
});

test("details of another domain, or none at all, are not taken for ours", async (t) => {
  const info = new BinaryWriter().tag(1, 2).string("OVER_LIMIT").tag(2, 2).string("proxy.example");
  const any = new BinaryWriter()
    .tag(1, 2)
    .string("type.googleapis.com/google.rpc.ErrorInfo")
    .tag(2, 2)
    .bytes(info.finish());
  const status = new BinaryWriter().tag(1, 0).int32(8).tag(3, 2).bytes(any.finish()).finish();
  const details = [Buffer.from(status), Buffer.from([255])];
  const server = createServer();
  server.on("stream", (stream) => {
    stream.respond(
      {
        ":status": 200,
        "content-type": "application/grpc",
        "grpc-status": "8",
        "grpc-message": "slow down",
        "grpc-status-details-bin": details.shift()?.toString("base64") ?? "",
        "x-request-id": "theirs",
      },
      { endStream: true },
    );
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => server.close());
  const { port } = server.address() as AddressInfo;
  await using client = new Tokenwire({ target: `127.0.0.1:${port}`, token: "" });
  for (const howMany of [1, 0]) {
    const error = await failure(client.chat("x", { model }));
    assert.deepEqual([error.code, error.reason], ["RESOURCE_EXHAUSTED", ""]);
    assert.equal(error.rawMessage, "slow down");
    assert.equal(error.requestId, "theirs"); // what they have in their log
    assert.equal(error.proto.details.length, howMany);
  }
});

test("a stream whose connection broke was interrupted", async (t) => {
  const delta = Buffer.from([0, 0, 0, 0, 7, 0x0a, 5, 0x0a, 3, ...Buffer.from("Hel")]);
  const server = createServer();
  let begins = true;
  server.on("stream", (stream) => {
    stream.respond({ ":status": 200, "content-type": "application/grpc" });
    if (begins) stream.write(delta);
    setTimeout(() => stream.session?.destroy(), 50); // as of a gateway that is killed
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => server.close());
  const { port } = server.address() as AddressInfo;
  await using client = new Tokenwire({ target: `127.0.0.1:${port}`, token: "" });
  const broken = async (): Promise<TokenwireError> =>
    await failure(
      (async () => {
        for await (const _ of client.stream("x", { model }));
      })(),
    );
  let error = await broken();
  assert.deepEqual([error.code, error.reason], ["UNAVAILABLE", "UPSTREAM_STREAM_INTERRUPTED"]);
  assert.equal(error.partialText, "Hel");
  begins = false;
  error = await broken();
  assert.deepEqual([error.code, error.reason], ["UNAVAILABLE", ""]); // nothing had come
});

test("an error can be made by hand, for tests of one's own", () => {
  const cause = new Error("why");
  const error = new TokenwireError("no", { code: "ABORTED", reason: "CALLER_STALLED", cause });
  assert.equal(error.message, "CALLER_STALLED: no");
  assert.equal(error.cause, cause);
  assert.equal(error.proto.code, 10);
  assert.equal(error.isRetryable, false);
  assert.equal(new TokenwireError("x", { code: "UNKNOWN" }).cause, undefined);
  assert.equal(
    new TokenwireError("x", { code: "UNKNOWN", metadata: { attempts: "many" } }).attempts,
    0,
  );
});
