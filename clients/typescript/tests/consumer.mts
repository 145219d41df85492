/** How an ES module of others sees the types, nodenext, with nothing skipped: `make check`. */

import { jsonSchema, type Reply, Tokenwire, TokenwireError, type Usage } from "tokenwire";
import { FakeGateway } from "tokenwire/testing";
import { type ChatRequest, ChatRequestSchema, create } from "tokenwire/v1";

const client = new Tokenwire({ target: "localhost:1", token: async () => "t" });
const zodLike = { parse: (value: unknown): Date => new Date(String(value)) };
export const typed: Promise<Reply<Date>> = client.chat("x", {
  jsonSchema: jsonSchema({}, zodLike),
});
export const request: ChatRequest = create(ChatRequestSchema, { model: "m" });
export const usage: Usage | undefined = client.stream(request).usage;
export const error = new TokenwireError("x", { code: "ABORTED" });
export const gateway: Promise<FakeGateway> = FakeGateway.start();

// @ts-expect-error: no such option
client.chat("x", { maxTokens: 1 });
// @ts-expect-error: no such code
new TokenwireError("x", { code: "OK" });
// @ts-expect-error: a tokenizer is that of a model
client.tokenize("x", {});
