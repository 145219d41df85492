/** Every TypeScript snippet of the README and every example runs, against a fake gateway. */

import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { FakeGateway, toolCall } from "tokenwire/testing";

// This file runs as dist/dev/tests/readme.test.js.
const DEV = fileURLToPath(new URL("..", import.meta.url));
const SECTIONS = JSON.parse(
  readFileSync(new URL("../../readme/sections.json", import.meta.url), "utf8"),
) as string[];

const weather = toolCall("weather", { city: "Rome" });

// Per section: the script of the gateway, and what all its snippets together print.
const SCRIPTS: Record<string, [script: (gateway: FakeGateway) => unknown, printed: string]> = {
  Connect: [() => undefined, ""],
  Ask: [
    (gateway) =>
      gateway
        .reply("Rayleigh.")
        .reply("Short waves.")
        .reply("Long way.")
        .reply('{"city": "Oslo", "degrees": -3}'),
    "Rayleigh.\nstop 6 fake\nLong way.\n-3\n",
  ],
  Stream: [
    (gateway) => gateway.reply("Once", " upon").reply("a", " time"),
    "Once upon\n0 ms, 6 tokens\nstop\na time",
  ],
  Tools: [(gateway) => gateway.reply(weather).reply("Yes."), "Yes.\n"],
  Cancel: [
    (gateway) => gateway.hang("one two three ", "four five six").hang(),
    "one two three four five six\nCANCELLED enough\n",
  ],
  Errors: [
    (gateway) =>
      gateway
        .fail("RATE_LIMITED", { retryAfterMs: 1500, metadata: { requestId: "r" } })
        .fail("UPSTREAM_STREAM_INTERRUPTED", { after: ["Once"] }),
    "RESOURCE_EXHAUSTED\nRATE_LIMITED\n1500\nr\n" +
      "Once\n[UPSTREAM_STREAM_INTERRUPTED after 4 characters]\n",
  ],
  Retries: [(gateway) => gateway.fail("RATE_LIMITED", { retryAfterMs: 10 }).reply("Hi!"), "Hi!\n"],
  Batch: [
    (gateway) => {
      for (const text of ["2", "Oslo", "old pond", "2", "Oslo", "o"]) gateway.reply(text);
    },
    "2 haiku old pond\n1  Oslo\n0  2\n2\nOslo\no\n",
  ],
  Tokens: [() => undefined, "3\n[ 0, 1 ] 2\n[ 'gpt-4o-mini' ]\n"],
  "Test your code": [() => undefined, ""],
};

interface Ran {
  code: number | null;
  out: string;
  err: string;
}

function start(module: string, gateway: FakeGateway): ChildProcess {
  const env = { ...process.env, TOKENWIRE_TARGET: gateway.target, TOKENWIRE_TOKEN: "" };
  return spawn(process.execPath, [`${DEV}${module}`], { env, stdio: "pipe" });
}

async function finished(child: ChildProcess, input = ""): Promise<Ran> {
  const ran: Ran = { code: null, out: "", err: "" };
  child.stdout?.on("data", (data) => {
    ran.out += data;
  });
  child.stderr?.on("data", (data) => {
    ran.err += data;
  });
  child.stdin?.end(input);
  ran.code = await new Promise((resolve) => child.on("close", resolve));
  return ran;
}

test("every section has its script", () => {
  assert.deepEqual(SECTIONS, Object.keys(SCRIPTS));
});

for (const [title, [script, printed]] of Object.entries(SCRIPTS)) {
  test(`README, ${title}`, async (t) => {
    const gateway = await FakeGateway.start();
    t.after(() => gateway.close());
    script(gateway);
    const module = `dist/readme/${title.toLowerCase().replaceAll(" ", "-")}.js`;
    const { code, out, err } = await finished(start(module, gateway));
    assert.deepEqual([code, err], [0, ""]);
    assert.equal(out.replace(/\d+ ms/, "0 ms"), printed);
  });
}

async function example(t: import("node:test").TestContext): Promise<FakeGateway> {
  const gateway = await FakeGateway.start();
  t.after(() => gateway.close());
  return gateway;
}

test("example: conversation", async (t) => {
  const gateway = await example(t);
  gateway.reply("Hel", "lo").fail("CONTENT_FILTERED", { message: "no", after: ["Wel"] });
  gateway.reply("Bye");
  const child = start("examples/conversation.js", gateway);
  const { code, out, err } = await finished(child, "Hi\nWhat?\nBye\n");
  assert.deepEqual([code, err], [0, ""]);
  assert.match(out, /^> Hello\n> Wel \[CONTENT_FILTERED: no \(request .*\)\]\n> Bye\n> $/);
  const said = gateway.calls[2]?.request.messages.map((message) => message.content);
  assert.deepEqual(said, ["Hi", "Hello", "What?", "Wel", "Bye"]);
});

test("example: Ctrl-C stops an answer, not the conversation", async (t) => {
  const gateway = await example(t);
  gateway.hang("Hel");
  const child = start("examples/conversation.js", gateway);
  child.stdout?.on("data", (data) => {
    if (String(data).includes("Hel")) child.kill("SIGINT");
  });
  const { code, out } = await finished(child, "Hi\n");
  assert.deepEqual([code, out], [0, "> Hel [stopped]\n> "]);
  assert.equal(await gateway.calls[0]?.waitCancelled(), true);
});

test("example: tools", async (t) => {
  const gateway = await example(t);
  gateway.reply(weather, toolCall("weather", '{"ci', { id: "c2", index: 1 })).reply("In Rome.");
  const { code, out, err } = await finished(start("examples/tools.js", gateway));
  assert.deepEqual([code, err], [0, ""]);
  assert.equal(out.split("\n")[1], '[weather {"city":"Rome"} -> 21]');
  assert.ok(out.endsWith("In Rome.\n"));
  assert.match(gateway.calls[1]?.request.messages.at(-1)?.content ?? "", /is not JSON/);
});

test("example: batch", async (t) => {
  const gateway = await example(t);
  gateway.reply("one").fail("CONTENT_FILTERED", { message: "no" }).reply("three");
  const { code, out, err } = await finished(start("examples/batch.js", gateway), "1\n\n2\n3\n");
  assert.deepEqual([code, out], [1, '2\t"three"\n0\t"one"\n']);
  assert.match(err, /^1\tCONTENT_FILTERED: no \(request /);
});

test("every example is run", () => {
  const files = readdirSync(new URL("../examples", import.meta.url)).sort();
  assert.deepEqual(files, ["batch.js", "conversation.js", "tools.js"]);
});
