/** The tarball as others get it: installed in an empty folder, compiled against, imported. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const run = promisify(execFile);

// This file runs as clients/typescript/dist/dev/tests/consumer.test.js.
const HERE = fileURLToPath(new URL("../../..", import.meta.url));
const README = join(HERE, "dist", "readme");
const { version, devDependencies } = JSON.parse(
  readFileSync(join(HERE, "package.json"), "utf8"),
) as { version: string; devDependencies: Record<string, string> };
const TARBALL = join(HERE, "..", "..", "build", "typescript", `tokenwire-${version}.tgz`);

const APP = `
import assert from "node:assert/strict";
import { type Reply, Tokenwire, TokenwireError } from "tokenwire";
import { FakeGateway } from "tokenwire/testing";
import { ErrorReason } from "tokenwire/v1";

const gateway = await FakeGateway.start();
const client: Tokenwire = gateway.client();
gateway.reply("Hello", " world").fail("RATE_LIMITED", { after: ["Hel"], retryAfterMs: 1500 });

let text = "";
const stream = client.stream("Hi", { model: "any" });
for await (const event of stream) text += event.text;
const reply: Reply = await stream.reply();
assert.deepEqual([text, reply.text, reply.usage.totalTokens], ["Hello world", "Hello world", 3]);

await assert.rejects(client.stream("Hi", { model: "any" }).reply(), (error: unknown) => {
  assert.ok(error instanceof TokenwireError);
  assert.ok(error.reason in ErrorReason);
  return error.partialText === "Hel" && error.retryAfterMs === 1500;
});

// @ts-expect-error: the types are those of the package, and strict
await assert.rejects(client.chat("Hi", { model: 5 }), TypeError);

client.close();
await gateway.close();
console.log("ok");
`;

const REQUIRED = `
const { FakeGateway } = require("tokenwire/testing");
(async () => {
  const gateway = await FakeGateway.start();
  const client = gateway.client();
  console.log((await client.model("gpt-4o-mini")).name);
  client.close();
  await gateway.close();
})();
`;

test("an empty folder: npm install, tsc --strict, import, require", async (t) => {
  const folder = mkdtempSync(join(tmpdir(), "tokenwire-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const npm = (...words: string[]) => run("npm", [...words, "--loglevel=error"], { cwd: folder });
  await npm("init", "--yes");
  await npm("pkg", "set", "type=module");
  const types = `@types/node@${devDependencies["@types/node"]}`;
  try {
    await npm(
      "install",
      TARBALL,
      types,
      "--prefer-offline",
      "--ignore-scripts",
      "--no-audit",
      "--no-fund",
    );
  } catch (error) {
    const { stderr } = error as { stderr: string };
    const unreachable = /ENOTCACHED|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT/.test(stderr);
    if (!unreachable || process.env["CI"]) throw error;
    t.skip("npm reaches no registry, and has not been here before");
    return;
  }

  writeFileSync(join(folder, "app.ts"), APP);
  writeFileSync(join(folder, "required.cjs"), REQUIRED);
  // What the README shows compiles with nothing but the package.
  cpSync(README, join(folder, "readme"), { recursive: true });
  // Nothing is skipped: neither our declarations nor those they rest on.
  const compilerOptions = { module: "nodenext", target: "es2022", strict: true, types: ["node"] };
  const settings = { compilerOptions, include: ["app.ts", "readme/*.ts"] };
  writeFileSync(join(folder, "tsconfig.json"), JSON.stringify(settings));
  const compiler = join(HERE, "node_modules", ".bin", "tsc");
  await run(compiler, ["-p", folder]).catch(({ stdout }) => assert.fail(stdout));

  const imported = await run(process.execPath, ["app.js"], { cwd: folder });
  assert.deepEqual([imported.stdout, imported.stderr], ["ok\n", ""]);
  const required = await run(process.execPath, ["required.cjs"], { cwd: folder });
  assert.equal(required.stdout, "gpt-4o-mini\n");
});
