/** The client: every call of the API, with the streams it returns. */

import { randomUUID } from "node:crypto";
import { create, type DescMessage } from "@bufbuild/protobuf";
import { type ConnectOptions, Endpoint } from "./channel.js";
import { attachPartial, fromStatus, INCOMPLETE, REQUEST_ID_KEY, TokenwireError } from "./errors.js";
import {
  type BatchChatRequest,
  type BatchChatResponse,
  ChatService,
  type StreamChatResponse,
} from "./gen/tokenwire/v1/chat_service_pb.js";
import { type Model as ModelProto, ModelService } from "./gen/tokenwire/v1/model_service_pb.js";
import { TokenizerService } from "./gen/tokenwire/v1/tokenizer_service_pb.js";
import {
  Accumulator,
  type Answer,
  type Choice,
  type Header,
  type Parser,
  Reply,
  type StreamEvent,
  type Usage,
} from "./replies.js";
import {
  AnswerSchema,
  type BatchItem,
  type BatchOptions,
  batchRequest,
  type CallOptions,
  type ChatOptions,
  chatRequest,
  countRequest,
  onlyCallOptions,
  type Prompt,
  type StreamOptions,
  streamRequest,
  tokenizeRequest,
} from "./requests.js";
import { type Call, type Reader, Transport } from "./rpc.js";

/** Milliseconds a call with one answer may take when nobody said: long answers take minutes. */
const DEFAULT_TIMEOUT_MS = 600_000;

/** How to make a {@link Tokenwire}. */
export interface TokenwireOptions extends ConnectOptions {
  /**
   * Milliseconds for calls with one answer that set none of their own, 600 000 unless given;
   * `Infinity` for no limit. Streams and batches have no limit but their own `timeoutMs`.
   */
  timeoutMs?: number | undefined;
}

/** Tokens of a text or conversation. */
export interface TokenCount {
  /** How many. */
  readonly totalTokens: number;
  /** Tokenizer used, for example "o200k_base". */
  readonly tokenizer: string;
  /** False when the tokenizer or the chat layout is an approximation. */
  readonly exact: boolean;
}

/** Tokens of one text. */
export interface TokenList {
  /** Token ids. */
  readonly ids: readonly number[];
  /** Bytes of each token, in the order of `ids`. */
  readonly pieces: readonly Uint8Array[];
}

/** A model. */
export interface Model {
  /** Name used in requests. */
  readonly name: string;
  /** Other names for it. */
  readonly aliases: readonly string[];
  /** Configured upstream. */
  readonly upstream: string;
  /** Name the upstream knows it by. */
  readonly upstreamModel: string;
  /** Tokens of context, if known. */
  readonly contextWindowTokens: number | undefined;
  /** Cap on generated tokens, if any. */
  readonly maxCompletionTokens: number | undefined;
  /** Open set: "tools", "json_schema", "vision", "reasoning", ... */
  readonly capabilities: readonly string[];
  /** Tokenizer used for counting. */
  readonly tokenizer: string;
  /** The contract's message. */
  readonly proto: ModelProto;
}

/**
 * A client of one gateway: one connection per replica, shared by all its calls.
 *
 * Every call rejects with {@link TokenwireError} when it fails, and with TypeError or RangeError,
 * before anything is sent, when it is not understood.
 */
export class Tokenwire implements AsyncDisposable {
  /** HOST:PORT or gRPC target this connects to. */
  readonly target: string;
  readonly #transport: Transport;
  readonly #timeoutMs: number | undefined;

  constructor(options: TokenwireOptions = {}) {
    const endpoint = new Endpoint(options, process.env);
    this.#timeoutMs = milliseconds(options.timeoutMs ?? DEFAULT_TIMEOUT_MS);
    this.target = endpoint.target;
    this.#transport = new Transport(endpoint);
  }

  /** The whole answer to a question or conversation. */
  async chat<T = unknown>(prompt: Prompt, options: ChatOptions<T> = {}): Promise<Reply<T>> {
    const request = chatRequest(prompt, options);
    const call = prepared(ChatService.method.chat, request, options, this.#timeoutMs);
    return new Reply(await this.#transport.unary(call), call.requestId, parserOf(options));
  }

  /**
   * The answer as it grows; the call starts now, and ends when its loop is left.
   *
   * Throws TypeError or RangeError for what is not understood; all else is thrown to the reader.
   */
  stream<T = unknown>(prompt: Prompt, options: StreamOptions<T> = {}): ChatStream<T> {
    const request = streamRequest(prompt, options);
    const call = prepared(ChatService.method.streamChat, request, options, undefined);
    return new ChatStream(this.#transport.open(call), call.requestId, parserOf(options));
  }

  /**
   * Answers to independent conversations (1 to 256), each as soon as it is there.
   *
   * Leaving the loop cancels what has not been answered.
   */
  batch(items: Iterable<BatchItem>, options: BatchOptions = {}): BatchStream {
    const request = batchRequest(items, options);
    const call = prepared(ChatService.method.batchChat, request, options, undefined);
    return new BatchStream(this.#transport.open(call), call.requestId, request);
  }

  /**
   * Like `batch`, all at once and in the order of the items.
   *
   * When the batch as a whole fails after some results, the items without one have that failure as
   * their error; when it fails before any, or is aborted, it is thrown.
   */
  async batchOrdered(
    items: Iterable<BatchItem>,
    options: BatchOptions = {},
  ): Promise<BatchResult[]> {
    return await this.batch(items, options).ordered();
  }

  /** Tokens of a text, or of a conversation with its layout, tools and format. */
  async countTokens(prompt: Prompt, options: ChatOptions = {}): Promise<TokenCount> {
    const request = countRequest(prompt, options);
    const { totalTokens, tokenizer, exact } = await this.#transport.unary(
      prepared(TokenizerService.method.countTokens, request, options, this.#timeoutMs),
    );
    return { totalTokens, tokenizer, exact };
  }

  /** The tokens of each text. */
  async tokenize(
    texts: string | readonly string[],
    options: CallOptions & { model: string },
  ): Promise<TokenList[]> {
    const request = tokenizeRequest(texts, options);
    const call = prepared(TokenizerService.method.tokenize, request, options, this.#timeoutMs);
    const { lists } = await this.#transport.unary(call);
    const [got, asked] = [lists.length, request.texts.length];
    if (got !== asked) throw incomplete(`got the tokens of ${got} of ${asked} texts`, call);
    return lists.map(({ ids, pieces }) => ({ ids, pieces }));
  }

  /** Every model the caller may use, from all pages. */
  async models(options: CallOptions = {}): Promise<Model[]> {
    onlyCallOptions(options);
    const models: Model[] = [];
    const read = new Set<string>(); // tokens of pages
    let pageToken = "";
    do {
      const request = create(ModelService.method.listModels.input, { pageToken });
      const call = prepared(ModelService.method.listModels, request, options, this.#timeoutMs);
      const page = await this.#transport.unary(call);
      models.push(...page.models.map(modelOf));
      pageToken = page.nextPageToken;
      if (read.has(pageToken)) {
        throw incomplete("the list of models goes on with a page that was read", call);
      }
      read.add(pageToken);
    } while (pageToken !== "");
    return models;
  }

  /** One model, by name or alias. */
  async model(name: string, options: CallOptions = {}): Promise<Model> {
    onlyCallOptions(options);
    const request = create(ModelService.method.getModel.input, { name });
    const call = prepared(ModelService.method.getModel, request, options, this.#timeoutMs);
    const { model } = await this.#transport.unary(call);
    if (model === undefined) throw incomplete("got an answer without a model", call);
    return modelOf(model);
  }

  /** Cancel what runs and close the connection. */
  close(): void {
    this.#transport.close();
  }

  /** For `await using`: closes. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }
}

/** A stream that is read once, by a loop that cancels it when it is left. */
abstract class OneLoop<M, Item> implements AsyncIterable<Item>, AsyncDisposable {
  readonly #opening: Promise<Reader<M>>;
  /** The call's `x-request-id`. */
  readonly requestId: string;
  #reader: Reader<M> | undefined;
  #taken = false;

  constructor(opening: Promise<Reader<M>>, requestId: string) {
    this.#opening = opening;
    this.requestId = requestId;
    opening.then(
      (reader) => {
        this.#reader = reader;
      },
      () => {}, // Whoever reads gets the failure; nobody reading is no unhandled rejection.
    );
  }

  /** Reads the stream: once. Leaving the loop cancels the call, and so the upstream. */
  [Symbol.asyncIterator](): AsyncIterableIterator<Item> {
    if (this.#taken) throw new Error("a stream can be read only once");
    this.#taken = true;
    return this.leavable(this.#read());
  }

  /** Ends the call, at the gateway and at the upstream; its loop throws CANCELLED when it goes on. */
  cancel(): void {
    if (this.#reader !== undefined) {
      this.#reader.cancel();
      return;
    }
    this.#opening.then(
      (reader) => reader.cancel(),
      () => {},
    );
  }

  /** For `await using`: cancels. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.cancel();
  }

  async *#read(): AsyncGenerator<Item, undefined> {
    try {
      const reader = await this.#opening;
      for (;;) {
        const message = await reader.next();
        if (message === undefined) break;
        const item = this.receive(message);
        if (item !== undefined) yield item;
      }
      this.end();
    } catch (error) {
      this.cancel(); // what is refused here goes on there
      if (error instanceof TokenwireError) throw this.failed(error);
      throw error;
    }
    return undefined;
  }

  /** `loop`, which cancels the call even if it is left before it began, or while it waits. */
  protected leavable<T>(loop: AsyncGenerator<T, undefined>): AsyncIterableIterator<T> {
    return {
      next: () => loop.next(),
      return: async () => {
        this.cancel();
        await loop.return(undefined).catch(() => {}); // the CANCELLED of a loop that waits
        return { done: true, value: undefined };
      },
      [Symbol.asyncIterator]() {
        return this;
      },
    };
  }

  /** Whether a loop has begun. */
  protected get wasTaken(): boolean {
    return this.#taken;
  }

  /** What to hand to the caller for `message`; undefined for nothing. */
  protected abstract receive(message: M): Item | undefined;
  /** The server said OK; throws TokenwireError if that cannot be. */
  protected abstract end(): void;
  /** The error to throw for the one the stream ended with. */
  protected abstract failed(error: TokenwireError): TokenwireError;
}

/**
 * An answer as it grows: loop over its events, read what is there so far.
 *
 * A loop that ends without an exception has seen the whole answer. Leaving it, by `break`,
 * `return` or an exception, cancels the call and so the upstream.
 */
export class ChatStream<T = unknown> extends OneLoop<StreamChatResponse, StreamEvent> {
  readonly #answer: Accumulator<T>;
  readonly #startedAt = performance.now();
  #error: TokenwireError | undefined;
  #timeToFirstTokenMs: number | undefined;

  /** @internal */
  constructor(
    opening: Promise<Reader<StreamChatResponse>>,
    requestId: string,
    parser: Parser<T> | undefined,
  ) {
    super(opening, requestId);
    this.#answer = new Accumulator(parser);
  }

  /** Only the new text of one choice: another way to read the stream, and to leave it. */
  textDeltas(choiceIndex = 0): AsyncIterableIterator<string> {
    return this.leavable(textOf(this, choiceIndex));
  }

  /**
   * The whole answer, as `chat` returns it; reads the stream to its end if no loop has begun.
   *
   * Rejects with the stream's TokenwireError if it failed, with Error if its loop was left.
   */
  async reply(): Promise<Reply<T>> {
    if (!this.wasTaken) for await (const _ of this);
    if (this.#error !== undefined) throw this.#error;
    if (!this.isComplete) {
      throw new Error(
        "the stream was not read to its end; what has arrived is in .choices and .text",
      );
    }
    return this.#answer.soFar(this.requestId);
  }

  /** Answers so far, by index. */
  get choices(): readonly Choice<T>[] {
    return this.#answer.choices;
  }

  /** The first choice so far: its message, text, tool calls. */
  get first(): Choice<T> {
    return this.#answer.first;
  }

  /** The first choice's message so far; append it to the conversation to go on. */
  get message(): Answer["message"] {
    return this.first.message;
  }

  /** The first choice's text so far. */
  get text(): string {
    return this.first.text;
  }

  /** The first choice's reasoning so far. */
  get reasoning(): string {
    return this.first.reasoning;
  }

  /** The first choice's refusal so far. */
  get refusal(): string {
    return this.first.refusal;
  }

  /** The first choice's tool calls so far: whole once the stream is. */
  get toolCalls(): Answer["toolCalls"] {
    return this.first.toolCalls;
  }

  /** Why the first choice ended; "" while it grows. */
  get finishReason(): Answer["finishReason"] {
    return this.first.finishReason;
  }

  /** Model, upstream, attempts; undefined before the first event. */
  get header(): Header | undefined {
    return this.#answer.header;
  }

  /** Tokens used; undefined until the stream is complete. */
  get usage(): Usage | undefined {
    return this.#answer.usage;
  }

  /** Whether the whole answer is here. */
  get isComplete(): boolean {
    return this.#answer.isComplete;
  }

  /** From the call to the first text, reasoning or tool call, measured here. */
  get timeToFirstTokenMs(): number | undefined {
    return this.#timeToFirstTokenMs;
  }

  protected override receive(message: StreamChatResponse): StreamEvent | undefined {
    const event = this.#answer.add(message);
    if (this.#timeToFirstTokenMs === undefined && event !== undefined && hasToken(event)) {
      this.#timeToFirstTokenMs = performance.now() - this.#startedAt;
    }
    return event;
  }

  protected override end(): void {
    if (this.isComplete) return;
    // A wrong OK is worse than any error: the caller would take a part for the whole.
    throw new TokenwireError(
      "the stream ended with OK but without its trailer: the answer is not whole",
      { code: "INTERNAL", reason: INCOMPLETE, requestId: this.requestId },
    );
  }

  protected override failed(error: TokenwireError): TokenwireError {
    this.#error = attachPartial(error, this.#answer.soFar(this.requestId));
    return this.#error;
  }
}

async function* textOf(
  events: AsyncIterable<StreamEvent>,
  choiceIndex: number,
): AsyncGenerator<string, undefined> {
  for await (const event of events) {
    if (event.text !== "" && event.choiceIndex === choiceIndex) yield event.text;
  }
  return undefined;
}

function hasToken(event: StreamEvent): boolean {
  if (event.text !== "") return true;
  const { case: kind, value } = event.proto.event;
  return kind === "delta" && Boolean(value.reasoning || value.refusal || value.toolCalls.length);
}

/** How one item of a batch ended: exactly one of `reply` and `error` is there. */
export type BatchResult = {
  /** Position among the items. */
  readonly index: number;
  /** The item's own name; "" when it had none. */
  readonly customId: string;
  /** The reply; throws the error if there is none. */
  unwrap(): Reply;
} & (
  | { readonly reply: Reply; readonly error?: undefined }
  | { readonly error: TokenwireError; readonly reply?: undefined }
);

/** The results of a batch, each as soon as it is there. Leaving the loop cancels the rest. */
export class BatchStream extends OneLoop<BatchChatResponse, BatchResult> {
  readonly #customIds: readonly string[];
  readonly #results = new Map<number, BatchResult>();
  #mixedUp = false;

  /** @internal */
  constructor(
    opening: Promise<Reader<BatchChatResponse>>,
    requestId: string,
    request: BatchChatRequest,
  ) {
    super(opening, requestId);
    this.#customIds = request.items.map((item) => item.customId);
  }

  /** Waits for all and returns them by index, see {@link Tokenwire.batchOrdered}. */
  async ordered(): Promise<BatchResult[]> {
    try {
      for await (const _ of this);
    } catch (error) {
      // The results that did arrive have been paid for. Yet who has left does not want them, and
      // nobody knows whose they are where some were of no item.
      if (!(error instanceof TokenwireError) || this.#results.size === 0) throw error;
      if (error.code === "CANCELLED" || this.#mixedUp) throw error;
      for (const index of this.#missing()) {
        this.#results.set(index, failedItem(index, this.#customIds[index] ?? "", error));
      }
    }
    return [...this.#results.values()].sort((a, b) => a.index - b.index);
  }

  protected override receive(message: BatchChatResponse): BatchResult | undefined {
    const { index, customId, result } = message;
    if (result.case === undefined) return undefined;
    if (!(index in this.#customIds) || this.#results.has(index)) {
      this.#mixedUp = true;
      throw new TokenwireError(
        `got a result of item ${index}, which is none of the batch or had one`,
        { code: "INTERNAL", reason: INCOMPLETE, requestId: this.requestId },
      );
    }
    let item: BatchResult;
    if (result.case === "response") {
      const reply = new Reply(result.value, this.requestId);
      item = { index, customId, reply, unwrap: () => reply };
    } else {
      item = failedItem(index, customId, fromStatus(result.value, { requestId: this.requestId }));
    }
    this.#results.set(index, item);
    return item;
  }

  protected override end(): void {
    const missing = this.#missing().length;
    if (missing === 0) return;
    throw new TokenwireError(
      `the batch ended with OK but without the result of ${missing} of ` +
        `${this.#customIds.length} items`,
      { code: "INTERNAL", reason: INCOMPLETE, requestId: this.requestId },
    );
  }

  protected override failed(error: TokenwireError): TokenwireError {
    return error;
  }

  #missing(): number[] {
    return [...this.#customIds.keys()].filter((index) => !this.#results.has(index));
  }
}

function failedItem(index: number, customId: string, error: TokenwireError): BatchResult {
  const unwrap = (): never => {
    throw error;
  };
  return { index, customId, error, unwrap };
}

/** An OK that lacks what was asked for is none. */
function incomplete(message: string, call: { requestId: string }): TokenwireError {
  const { requestId } = call;
  return new TokenwireError(message, { code: "INTERNAL", reason: INCOMPLETE, requestId });
}

// --- calls ----------------------------------------------------------------------------

function prepared<I extends DescMessage, O extends DescMessage>(
  method: Call<I, O>["method"],
  request: Call<I, O>["request"],
  options: CallOptions,
  defaultMs: number | undefined,
): Call<I, O> {
  const { requestId = randomUUID().replaceAll("-", ""), signal, metadata = {} } = options;
  if (typeof requestId !== "string" || !/^[\x20-\x7e]+$/.test(requestId)) {
    throw new TypeError(`requestId: expected printable ASCII, got ${JSON.stringify(requestId)}`);
  }
  for (const [name, value] of Object.entries(metadata)) checkMetadata(name, value);
  if (signal !== undefined && !(signal instanceof AbortSignal)) {
    throw new TypeError("signal: expected an AbortSignal");
  }
  const timeoutMs = options.timeoutMs === undefined ? defaultMs : milliseconds(options.timeoutMs);
  return { method, request, requestId, metadata, timeoutMs, signal };
}

function checkMetadata(name: string, value: unknown): void {
  if ([REQUEST_ID_KEY, "authorization"].includes(name.toLowerCase())) {
    throw new TypeError(`metadata: "${name}" has its own option (requestId, token)`);
  }
  if (!/^[0-9A-Za-z_.-]+$/.test(name)) {
    throw new TypeError(`metadata: "${name}" is no name, which has letters, digits and _.- alone`);
  }
  if (name.toLowerCase().endsWith("-bin")) {
    if (!(value instanceof Uint8Array)) {
      throw new TypeError(`metadata["${name}"]: expected a Uint8Array, as its name ends in -bin`);
    }
  } else if (typeof value !== "string" || !/^[\x20-\x7e]*$/.test(value)) {
    throw new TypeError(`metadata["${name}"]: expected a string of printable ASCII`);
  }
}

function milliseconds(timeoutMs: unknown): number | undefined {
  if (typeof timeoutMs !== "number" || !(timeoutMs > 0)) {
    throw new RangeError(`timeoutMs: expected milliseconds above 0, got ${String(timeoutMs)}`);
  }
  return timeoutMs === Number.POSITIVE_INFINITY ? undefined : timeoutMs;
}

function parserOf<T>(options: ChatOptions<T>): Parser<T> | undefined {
  return options.jsonSchema instanceof AnswerSchema ? options.jsonSchema.parser : undefined;
}

function modelOf(proto: ModelProto): Model {
  return {
    name: proto.name,
    aliases: proto.aliases,
    upstream: proto.upstream,
    upstreamModel: proto.upstreamModel,
    contextWindowTokens: proto.contextWindowTokens || undefined,
    maxCompletionTokens: proto.maxCompletionTokens || undefined,
    capabilities: proto.capabilities,
    tokenizer: proto.tokenizer,
    proto,
  };
}
