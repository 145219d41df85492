/** One RPC over a grpc-js channel: a message in, messages out, one kind of error. */

import {
  type DescMessage,
  type DescMethod,
  fromBinary,
  type MessageShape,
  toBinary,
} from "@bufbuild/protobuf";
import * as grpc from "@grpc/grpc-js";
import type { Endpoint } from "./channel.js";
import { fromCall, REQUEST_ID_KEY, TokenwireError } from "./errors.js";

/** One RPC to make. */
export interface Call<I extends DescMessage, O extends DescMessage> {
  readonly method: DescMethod & { input: I; output: O };
  readonly request: MessageShape<I>;
  readonly requestId: string;
  readonly metadata: Readonly<Record<string, string | Uint8Array>>;
  readonly timeoutMs: number | undefined;
  readonly signal: AbortSignal | undefined;
}

export function pathOf(method: DescMethod): string {
  return `/${method.parent.typeName}/${method.name}`;
}

export function serializer<D extends DescMessage>(schema: D): (message: MessageShape<D>) => Buffer {
  return (message) => {
    const bytes = toBinary(schema, message);
    return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  };
}

export function deserializer<D extends DescMessage>(schema: D): (bytes: Buffer) => MessageShape<D> {
  // A plain Uint8Array: `bytes` fields are views of what is parsed, and must not become Buffers.
  return (bytes) =>
    fromBinary(schema, new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength));
}

/** Carries the calls of one client. */
export class Transport {
  readonly #endpoint: Endpoint;
  readonly #client: grpc.Client;
  readonly #running = new Set<{ cancel(): void }>();
  #closed = false;

  constructor(endpoint: Endpoint) {
    this.#endpoint = endpoint;
    this.#client = endpoint.open();
  }

  /** The answer; rejects with TokenwireError. */
  async unary<I extends DescMessage, O extends DescMessage>(
    call: Call<I, O>,
  ): Promise<MessageShape<O>> {
    const { metadata, options } = await this.#prepared(call);
    const answer = await new Promise<MessageShape<O> | grpc.ServiceError>((settle) => {
      const rpc = this.#client.makeUnaryRequest(
        pathOf(call.method),
        serializer(call.method.input),
        deserializer(call.method.output),
        call.request,
        metadata,
        options,
        (error, response) => {
          release();
          settle(error ?? (response as MessageShape<O>));
        },
      );
      const release = this.#watched(rpc, call.signal);
    });
    if (answer instanceof Error) throw failed(call, answer);
    return answer;
  }

  /** Starts a stream of answers; with a token that is at hand, before it returns. */
  async open<I extends DescMessage, O extends DescMessage>(
    call: Call<I, O>,
  ): Promise<Reader<MessageShape<O>>> {
    const prepared = this.#prepared(call);
    const { metadata, options } = prepared instanceof Promise ? await prepared : prepared;
    const parse = deserializer(call.method.output);
    const rpc = this.#client.makeServerStreamRequest(
      pathOf(call.method),
      serializer(call.method.input),
      (bytes) => ({ message: parse(bytes), weight: bytes.length + PER_MESSAGE }),
      call.request,
      metadata,
      options,
    );
    const reader = new Reader(rpc, (error) => failed(call, error));
    reader.release = this.#watched(reader, call.signal);
    return reader;
  }

  /** Cancels what runs and closes the connection. */
  close(): void {
    this.#closed = true;
    for (const rpc of this.#running) rpc.cancel();
    this.#client.close();
  }

  #prepared(call: Call<DescMessage, DescMessage>): Prepared | Promise<Prepared> {
    // Since when: time that the token takes counts.
    const options: grpc.CallOptions =
      call.timeoutMs === undefined ? {} : { deadline: Date.now() + call.timeoutMs };
    const metadata = new grpc.Metadata();
    metadata.set(REQUEST_ID_KEY, call.requestId);
    for (const [name, value] of Object.entries(call.metadata)) {
      metadata.set(name, typeof value === "string" ? value : Buffer.from(value));
    }
    const ready = (): Prepared => {
      if (this.#closed) throw new Error("the client is closed");
      if (call.signal?.aborted) throw aborted(call, call.signal);
      return { metadata, options };
    };
    ready(); // do not ask for a token in vain
    const pending = this.#endpoint.authorize(metadata);
    if (!(pending instanceof Promise)) return ready();
    return this.#inTime(pending, call).then(ready);
  }

  /** What the token's supplier settles to, unless the call ends before: then the call's error. */
  async #inTime(pending: Promise<void>, call: Call<DescMessage, DescMessage>): Promise<void> {
    const { requestId, signal, timeoutMs } = call;
    let leave: (error: TokenwireError) => void = () => {};
    const ended = new Promise<never>((_, reject) => {
      leave = reject;
    });
    const cancel = () =>
      leave(
        signal?.aborted
          ? aborted(call, signal)
          : new TokenwireError("the client was closed", { code: "CANCELLED", requestId }),
      );
    const late = () => {
      const message = "the token's supplier did not answer within the call's timeout";
      leave(new TokenwireError(message, { code: "DEADLINE_EXCEEDED", requestId }));
    };
    const timer =
      timeoutMs === undefined ? undefined : setTimeout(late, Math.min(timeoutMs, LONGEST_TIMER));
    const done = this.#watched({ cancel }, signal);
    try {
      await Promise.race([pending, ended]);
    } finally {
      clearTimeout(timer);
      done();
    }
  }

  #watched(rpc: { cancel(): void }, signal: AbortSignal | undefined): () => void {
    const cancel = () => rpc.cancel();
    this.#running.add(rpc);
    signal?.addEventListener("abort", cancel, { once: true });
    return () => {
      this.#running.delete(rpc);
      // A signal often outlives its calls, and would keep each of them.
      signal?.removeEventListener("abort", cancel);
    };
  }
}

const LONGEST_TIMER = 2 ** 31 - 1; // milliseconds; setTimeout fires at once for more

interface Prepared {
  metadata: grpc.Metadata;
  options: grpc.CallOptions;
}

function failed(call: Call<DescMessage, DescMessage>, error: Failed): TokenwireError {
  if (error.code === grpc.status.CANCELLED && call.signal?.aborted) {
    return aborted(call, call.signal);
  }
  return fromCall(error.code, error.details, error.metadata, { requestId: call.requestId });
}

function aborted(call: Call<DescMessage, DescMessage>, signal: AbortSignal): TokenwireError {
  const { requestId } = call;
  const cause: unknown = signal.reason;
  return new TokenwireError("aborted by the signal", { code: "CANCELLED", requestId, cause });
}

/** A message and what it weighs. */
interface Arrived<M> {
  message: M;
  weight: number;
}

// What an answer that is read slowly may weigh here before the gateway is made to wait: tens of
// thousands of deltas, at 128 bytes for each besides its own, which is more than answers have.
const BUFFER = 4 * 1024 * 1024;
const PER_MESSAGE = 128;

/**
 * Messages of one stream, pulled one at a time.
 *
 * Not the async iterator of the stream itself. grpc-js tells a failure at once, and throws away
 * what had arrived and was not read: so this reads ahead. Yet not without end: a caller that reads
 * nothing must be felt by the gateway. Whoever is farther behind than `BUFFER` when the stream
 * fails loses what was on the way to it, some 64 KiB at most; grpc-js has no way to read those.
 */
export class Reader<M> {
  /** What to do once it is over; called at least once. */
  release: () => void = () => {};
  readonly #rpc: grpc.ClientReadableStream<Arrived<M>>;
  readonly #failed: (error: Failed) => TokenwireError;
  #ahead: Arrived<M>[] = [];
  #weight = 0;
  #failure: Failed | undefined;
  #ended = false;
  #left = false;
  #wake: () => void = () => {};

  constructor(
    rpc: grpc.ClientReadableStream<Arrived<M>>,
    failed: (error: Failed) => TokenwireError,
  ) {
    this.#rpc = rpc;
    this.#failed = failed;
    rpc.on("readable", () => this.#readAhead());
    rpc.on("end", () => {
      this.#ended = true;
      this.release();
      this.#wake();
    });
    rpc.on("error", (error: Error) => {
      this.#failure ??= error as grpc.ServiceError;
      this.release();
      this.#wake();
    });
  }

  /** The next message; undefined after the last; rejects with TokenwireError. */
  async next(): Promise<M | undefined> {
    for (;;) {
      const arrived = this.#left ? undefined : (this.#ahead.shift() ?? this.#read());
      if (arrived !== undefined) {
        this.#weight -= arrived.weight;
        this.#readAhead();
        return arrived.message;
      }
      if (this.#failure !== undefined) throw this.#failed(this.#failure);
      if (this.#ended) return undefined;
      await new Promise<void>((wake) => {
        this.#wake = wake;
      });
    }
  }

  /** Ends the call, here and at the gateway; who has left gets nothing of what had arrived. */
  cancel(): void {
    this.#left = true;
    this.#ahead = [];
    // grpc-js tells no end of a call that was whole already while some of it is unread.
    this.#failure = CANCELLED;
    this.#rpc.cancel();
    this.release();
    this.#wake();
  }

  #readAhead(): void {
    while (!this.#left && this.#weight < BUFFER) {
      const arrived = this.#read();
      if (arrived === undefined) break;
      this.#ahead.push(arrived);
    }
    this.#wake();
  }

  #read(): Arrived<M> | undefined {
    const arrived = this.#rpc.read() as Arrived<M> | null;
    if (arrived === null) return undefined;
    this.#weight += arrived.weight;
    return arrived;
  }
}

/** The status a call ended with. */
type Failed = Pick<grpc.ServiceError, "code" | "details" | "metadata">;

const CANCELLED: Failed = Object.freeze({
  code: grpc.status.CANCELLED,
  details: "the caller left the stream",
  metadata: new grpc.Metadata(),
});
