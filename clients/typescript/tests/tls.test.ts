/** TLS and mutual TLS over real sockets, with certificates made here. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createSecureServer, type ServerHttp2Session } from "node:http2";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import type { SecureContextOptions, TLSSocket } from "node:tls";
import { ChannelCredentials } from "@grpc/grpc-js";
import { type Tls, Tokenwire } from "tokenwire";
import { FakeGateway } from "tokenwire/testing";
import { ChatResponseSchema, create, toBinary } from "tokenwire/v1";
import { Authority } from "./certificates.js";
import { failure } from "./harness.js";

const model = "m";
const authority = new Authority("authority");
const stranger = new Authority("stranger");
const server = authority.issue("localhost", "127.0.0.1");
const caller = authority.issue("caller");

/** A gateway behind TLS; `saw` has the caller's name and token, call by call. */
async function encrypted(
  t: TestContext,
  options: SecureContextOptions & { requestCert?: boolean },
) {
  const saw: (string | undefined)[][] = [];
  const sessions: ServerHttp2Session[] = [];
  const gateway = createSecureServer({ rejectUnauthorized: true, ...options });
  gateway.on("session", (session) => sessions.push(session));
  gateway.on("sessionError", () => {});
  gateway.on("tlsClientError", () => {});
  gateway.on("stream", (stream, headers) => {
    const peer = (stream.session?.socket as TLSSocket | undefined)?.getPeerCertificate();
    saw.push([String(peer?.subject?.CN), headers.authorization]);
    const bytes = toBinary(
      ChatResponseSchema,
      create(ChatResponseSchema, { choices: [{ message: { role: "assistant", content: "ok" } }] }),
    );
    const head = Buffer.alloc(5);
    head.writeUInt32BE(bytes.length, 1);
    stream.respond(
      { ":status": 200, "content-type": "application/grpc" },
      { waitForTrailers: true },
    );
    stream.on("wantTrailers", () => stream.sendTrailers({ "grpc-status": "0" }));
    stream.end(Buffer.concat([head, bytes]));
  });
  gateway.listen(0, "127.0.0.1");
  await once(gateway, "listening");
  t.after(() => {
    for (const session of sessions) session.destroy();
    gateway.close();
  });
  return { saw, port: (gateway.address() as AddressInfo).port };
}

async function ask(port: number, tls: Tls, host = "127.0.0.1"): Promise<string> {
  await using client = new Tokenwire({ target: `${host}:${port}`, token: "secret", tls });
  return (await client.chat("x", { model, timeoutMs: 20_000 })).text;
}

/** The words of the error that a call of the client ends with: UNAVAILABLE, and no token sent. */
async function refused(port: number, tls: Tls, host?: string): Promise<string> {
  const error = await failure(ask(port, tls, host));
  assert.deepEqual([error.code, error.reason, error.isRetryable], ["UNAVAILABLE", "", true]);
  return error.message;
}

test("an authority of one's own: by address and by name, with the token", async (t) => {
  const { saw, port } = await encrypted(t, server);
  const { ca } = authority;
  assert.equal(await ask(port, { ca }), "ok");
  assert.equal(await ask(port, { ca: new TextEncoder().encode(ca) }, "localhost"), "ok");
  assert.equal(await ask(port, ChannelCredentials.createSsl(Buffer.from(ca))), "ok");
  assert.deepEqual(saw, Array(3).fill(["undefined", "Bearer secret"]));
});

test("a certificate of a stranger, or for another name, gets no call and no token", async (t) => {
  const { saw, port } = await encrypted(t, server);
  const other = await encrypted(t, authority.issue("elsewhere.example"));
  const [unknown, unsaid, misnamed] = await Promise.all([
    refused(port, { ca: stranger.ca }),
    refused(port, true),
    refused(other.port, { ca: authority.ca }, "localhost"),
  ]);
  for (const words of [unknown, unsaid]) assert.match(words, /unable to verify/);
  assert.match(misnamed, /localhost.*elsewhere\.example/);
  assert.deepEqual([...saw, ...other.saw], []);
});

test("plaintext to TLS, and TLS to plaintext, are errors", async (t) => {
  const { saw, port } = await encrypted(t, server);
  await using plain = await FakeGateway.start();
  await Promise.all([
    refused(port, false),
    refused(Number(plain.target.split(":")[1]), { ca: authority.ca }),
  ]);
  assert.deepEqual([saw, plain.calls], [[], []]);
});

test("mutual TLS: who has a certificate of the authority comes in, nobody else", async (t) => {
  const { ca } = authority;
  const { saw, port } = await encrypted(t, { ...server, ca, requestCert: true });
  assert.equal(await ask(port, { ca, ...caller }), "ok");
  assert.deepEqual(saw, [["caller", "Bearer secret"]]);
  const forged = stranger.issue("caller");
  await Promise.all([refused(port, { ca }), refused(port, { ca, ...forged })]);
  assert.equal(saw.length, 1);
});

test("a key of another certificate is told when the client is made", () => {
  const { key } = stranger.issue("other");
  const tls = { ca: authority.ca, cert: caller.cert, key };
  assert.throws(() => new Tokenwire({ target: "localhost:1", tls }), /key values mismatch/);
});

test("`tls: true` trusts the authorities that Node.js has", async (t) => {
  // Which those are is settled when Node.js starts: so another process asks.
  const { port } = await encrypted(t, server);
  const folder = mkdtempSync(join(tmpdir(), "tokenwire-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const path = join(folder, "ca.pem");
  writeFileSync(path, authority.ca);
  const code = `
    import { Tokenwire } from "tokenwire";
    const client = new Tokenwire({ target: "localhost:${port}", token: "t", tls: true });
    console.log((await client.chat("x", { model: "m" })).text);
    client.close();
  `;
  const child = spawn(process.execPath, ["--input-type=module", "-e", code], {
    env: { ...process.env, NODE_EXTRA_CA_CERTS: path, GRPC_DEFAULT_SSL_ROOTS_FILE_PATH: "" },
    stdio: ["ignore", "pipe", "inherit"],
  });
  const printed: Buffer[] = [];
  child.stdout.on("data", (bytes: Buffer) => printed.push(bytes));
  await once(child, "close");
  assert.equal(Buffer.concat(printed).toString(), "ok\n");
});
