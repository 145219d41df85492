/**
 * A stream survives silence with the client's own options: by pings the gateway tolerates.
 *
 * In short here, with the ping interval scaled down; `make test-idle` waits for 120 s.
 */

import assert from "node:assert/strict";
import { createServer, type ServerHttp2Session } from "node:http2";
import { type AddressInfo, connect, createServer as createTcpServer, type Socket } from "node:net";
import { test } from "node:test";
import { Tokenwire } from "tokenwire";
import { FakeGateway } from "tokenwire/testing";
import { create, StreamChatResponseSchema, toBinary } from "tokenwire/v1";

const long = Number(process.env["TOKENWIRE_IDLE_SECONDS"] ?? 0) * 1000;
const silence = long || 2500;
// The default is 30 s; scaled down by the same factor as the silence of 120 s.
const scaled = { "grpc.keepalive_time_ms": 500 };

function frame(event: object): Buffer {
  const bytes = toBinary(
    StreamChatResponseSchema,
    create(StreamChatResponseSchema, { event } as never),
  );
  const head = Buffer.alloc(5);
  head.writeUInt32BE(bytes.length, 1);
  return Buffer.concat([head, bytes]);
}

test(`a stream survives ${silence / 1000} s of silence`, async (t) => {
  const pings: number[] = [];
  const sessions: ServerHttp2Session[] = [];
  const server = createServer();
  server.on("session", (session) => {
    sessions.push(session);
    session.on("ping", () => pings.push(performance.now()));
  });
  server.on("stream", (stream) => {
    stream.respond(
      { ":status": 200, "content-type": "application/grpc" },
      { waitForTrailers: true },
    );
    stream.on("wantTrailers", () => stream.sendTrailers({ "grpc-status": "0" }));
    stream.write(frame({ case: "delta", value: { content: "before" } }));
    setTimeout(() => {
      stream.write(frame({ case: "delta", value: { content: ", after" } }));
      stream.end(frame({ case: "trailer", value: {} }));
    }, silence);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => {
    for (const session of sessions) session.destroy();
    server.close();
  });

  await using client = new Tokenwire({
    target: `127.0.0.1:${(server.address() as AddressInfo).port}`,
    channelOptions: long ? {} : scaled,
  });
  const reply = await client.stream("Think.", { model: "m" }).reply();

  assert.equal(reply.text, "before, after");
  assert.ok(pings.length >= 2, `${pings.length} pings`);
  assert.equal(sessions.length, 1);
  // The gateway cuts off who pings more often than each 10 s.
  const gaps = pings.slice(1).map((at, i) => at - (pings[i] ?? 0));
  if (long) assert.ok(Math.min(...gaps) > 10_000, `${gaps}`);
});

test("a gateway that is gone without a word is noticed", async (t) => {
  const gateway = await FakeGateway.start();
  gateway.hang("before");
  // A way to the gateway that falls silent, as when a machine or a link is gone.
  const sockets: Socket[] = [];
  const way = createTcpServer((socket) => {
    const onward = connect(Number(gateway.target.split(":")[1]), "127.0.0.1");
    socket.pipe(onward).pipe(socket);
    sockets.push(socket, onward);
  });
  await new Promise<void>((resolve) => way.listen(0, "127.0.0.1", resolve));
  t.after(async () => {
    for (const socket of sockets) socket.destroy();
    way.close();
    await gateway.close();
  });
  await using client = new Tokenwire({
    target: `127.0.0.1:${(way.address() as AddressInfo).port}`,
    channelOptions: { "grpc.keepalive_time_ms": 300, "grpc.keepalive_timeout_ms": 2000 },
  });
  const stream = client.stream("Think.", { model: "m", timeoutMs: 20_000 });
  const call = (async () => {
    for await (const event of stream) {
      if (event.text !== "before") continue;
      for (const socket of sockets) socket.unpipe();
    }
  })();
  await assert.rejects(call, {
    code: "UNAVAILABLE",
    reason: "UPSTREAM_STREAM_INTERRUPTED",
    partialText: "before",
  });
});

test("a ping goes out each 30 s, also while nothing runs", { timeout: 20_000 }, async (t) => {
  const { setTimeout: original } = globalThis;
  const pings: (() => void)[] = [];
  t.mock.method(globalThis, "setTimeout", (run: () => void, ms = 0) => {
    const timer = original(run, ms);
    if (ms === 30_000) pings.push(run);
    return timer;
  });
  let pinged = 0;
  const server = createServer();
  const sessions: ServerHttp2Session[] = [];
  const heard = new Promise<void>((resolve) => {
    server.on("session", (session) => {
      sessions.push(session);
      session.on("ping", () => {
        pinged += 1;
        resolve();
      });
    });
  });
  server.on("stream", (stream) => {
    const head = { ":status": 200, "content-type": "application/grpc", "grpc-status": "12" };
    stream.respond(head, { endStream: true });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => {
    for (const session of sessions) session.destroy();
    server.close();
  });
  await using client = new Tokenwire({
    target: `127.0.0.1:${(server.address() as AddressInfo).port}`,
    token: "",
  });
  await assert.rejects(client.models(), { code: "UNIMPLEMENTED" });
  assert.equal(pinged, 0);
  const waiting = pings.splice(0);
  assert.ok(waiting.length > 0);
  for (const run of waiting) run(); // 30 s later
  await heard;
});
