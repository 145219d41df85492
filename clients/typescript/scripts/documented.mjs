// Fails for a public declaration, or a member of one, without a doc comment:
// node scripts/documented.mjs dist/esm

import { readFileSync } from "node:fs";
import { join } from "node:path";

const FILES = ["channel", "client", "errors", "replies", "requests", "testing", "version"];
const EXPORTED = /^export (?:declare )?(?:abstract )?(?:class|function|interface|type|const) (\w+)/;
const MEMBER = /^ {4}(?:(?:static|readonly|abstract|get|async) )*(\w+)\??[(:<]/;

const [, , folder] = process.argv;
const missing = [];
for (const file of FILES) {
  const lines = readFileSync(join(folder, `${file}.d.ts`), "utf8").split("\n");
  let inside = "";
  let before = "";
  for (const line of lines) {
    const exported = EXPORTED.exec(line)?.[1];
    if (/^\S/.test(line)) inside = /\b(?:class|interface) /.test(line) ? (exported ?? "") : "";
    const member = inside ? MEMBER.exec(line)?.[1] : undefined;
    const name = exported ?? (member === "constructor" ? undefined : member);
    // Of overloads the first tells.
    if (name && !before.endsWith("*/") && !new RegExp(`\\b${name}\\b`).test(before)) {
      missing.push(`${file}.ts: ${exported ? "" : `${inside}.`}${name}`);
    }
    before = line.trimEnd();
  }
}

if (missing.length > 0) {
  console.error(`without a doc comment:\n  ${missing.join("\n  ")}`);
  process.exit(1);
}
