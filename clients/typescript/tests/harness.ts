/** What the tests share. */

import type { TestContext } from "node:test";
import { type Tokenwire, TokenwireError, type TokenwireOptions } from "tokenwire";
import { FakeGateway } from "tokenwire/testing";

/** A gateway and its client, both gone when the test is over. */
export async function pair(
  test: TestContext,
  options: TokenwireOptions = {},
  gatewayOptions: Parameters<typeof FakeGateway.start>[0] = {},
): Promise<{ gateway: FakeGateway; client: Tokenwire }> {
  const gateway = await FakeGateway.start(gatewayOptions);
  const client = gateway.client(options);
  test.after(async () => {
    client.close();
    await gateway.close();
  });
  return { gateway, client };
}

/** The TokenwireError that `call` rejects with. */
export async function failure(call: Promise<unknown>): Promise<TokenwireError> {
  try {
    await call;
  } catch (error) {
    if (error instanceof TokenwireError) return error;
    throw error;
  }
  throw new Error("the call did not fail");
}

/** Reads a stream to its end. */
export async function all<T>(stream: AsyncIterable<T>): Promise<T[]> {
  const items: T[] = [];
  for await (const item of stream) items.push(item);
  return items;
}

/** Waits until the gateway has received so many calls. */
export async function arrived(gateway: FakeGateway, calls: number): Promise<void> {
  while (gateway.calls.length < calls) await new Promise((resolve) => setTimeout(resolve, 5));
}
