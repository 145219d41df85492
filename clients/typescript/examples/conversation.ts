/**
 * A conversation at the terminal: streams each answer, Ctrl-C stops one, Ctrl-D ends.
 *
 * node conversation.js [MODEL]
 */

import { createInterface } from "node:readline";
import { type Message, Tokenwire, TokenwireError } from "tokenwire";

const model = process.argv[2] ?? "gpt-4o-mini";
const conversation: Message[] = [];
await using client = new Tokenwire();

process.stdout.write("> ");
for await (const question of createInterface({ input: process.stdin })) {
  conversation.push({ role: "user", content: question });
  const stream = client.stream(conversation, { model });
  const stop = () => stream.cancel();
  process.once("SIGINT", stop);
  try {
    for await (const text of stream.textDeltas()) process.stdout.write(text);
  } catch (error) {
    if (!(error instanceof TokenwireError)) throw error;
    process.stdout.write(error.code === "CANCELLED" ? " [stopped]" : ` [${error.message}]`);
  } finally {
    process.off("SIGINT", stop);
  }
  // What has arrived is what the person has seen: keep it in any case.
  conversation.push({ role: "assistant", content: stream.text });
  process.stdout.write("\n> ");
}
