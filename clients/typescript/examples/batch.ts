/**
 * Many questions at once, one per line of standard input; a table of answers and errors.
 *
 * node batch.js [MODEL] < questions.txt
 */

import { readFileSync } from "node:fs";
import { Tokenwire } from "tokenwire";

const model = process.argv[2] ?? "gpt-4o-mini";
const questions = readFileSync(0, "utf8")
  .split("\n")
  .map((line) => line.trim())
  .filter((line) => line !== "");
await using client = new Tokenwire();

for await (const { index, reply, error } of client.batch(questions, {
  model,
  maxCompletionTokens: 100,
})) {
  if (error === undefined) {
    console.log(`${index}\t${JSON.stringify(reply.text)}`);
  } else {
    process.exitCode = 1;
    console.error(`${index}\t${error.message}`);
  }
}
