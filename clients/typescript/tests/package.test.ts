/** The package as others get it: both module systems, the same names, one version. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { test } from "node:test";

const require = createRequire(import.meta.url);

for (const name of ["tokenwire", "tokenwire/testing", "tokenwire/v1"]) {
  test(`${name} is the same by import and by require`, async () => {
    const required = require(name) as Record<string, unknown>;
    const imported = (await import(name)) as Record<string, unknown>;
    const names = (module: object) =>
      Object.keys(module)
        .filter((key) => key !== "default" && key !== "module.exports")
        .sort();
    assert.deepEqual(names(required), names(imported));
    assert.ok(names(required).length > 3);
  });
}

test("CommonJS works as ES modules do", async () => {
  const { FakeGateway } = require("tokenwire/testing") as typeof import("tokenwire/testing");
  const { TokenwireError } = require("tokenwire") as typeof import("tokenwire");
  await using gateway = await FakeGateway.start();
  await using client = gateway.client();
  gateway.reply("ok").fail("INTERNAL");
  assert.equal((await client.chat("x", { model: "m" })).text, "ok");
  await assert.rejects(client.chat("x", { model: "m" }), TokenwireError);
});

test("the version is that of package.json", async () => {
  const { VERSION } = await import("tokenwire");
  const path = require.resolve("tokenwire/package.json");
  const { version } = JSON.parse(readFileSync(path, "utf8")) as { version: string };
  assert.equal(VERSION, version);
});

test("the contract for operators is no part of the client", async () => {
  assert.ok(!Object.keys(await import("tokenwire/v1")).some((name) => name.includes("Admin")));
});
