// Fails for a public declaration without a doc comment: node scripts/documented.mjs dist/esm

import { readFileSync } from "node:fs";
import { join } from "node:path";

const FILES = ["channel", "client", "errors", "replies", "requests", "testing"];
const [, , folder] = process.argv;
const missing = [];

for (const file of FILES) {
  const lines = readFileSync(join(folder, `${file}.d.ts`), "utf8").split("\n");
  const exported =
    /^export (?:declare )?(?:abstract )?(?:class|function|interface|type|const) (\w+)/;
  for (const [at, line] of lines.entries()) {
    const name = exported.exec(line)?.[1];
    const before = lines[at - 1]?.trim() ?? "";
    if (name !== undefined && !before.endsWith("*/") && !before.includes(` ${name}`)) {
      missing.push(`${file}.ts: ${name}`);
    }
  }
}

if (missing.length > 0) {
  console.error(`without a doc comment:\n  ${missing.join("\n  ")}`);
  process.exit(1);
}
