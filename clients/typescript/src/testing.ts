/**
 * A gateway inside your test process: real gRPC on a loopback port, answers from a script.
 *
 * ```ts
 * await using gateway = await FakeGateway.start();
 * await using client = gateway.client();
 * gateway.reply("Hello", " world");
 * assert.equal((await client.chat("Hi", { model: "any" })).text, "Hello world");
 * ```
 *
 * It speaks the contract as the gateway does (order of events, error details, trailers), except
 * where a test asks it not to (`cut`). It calls no model and counts words as tokens.
 */

import {
  create,
  type DescMessage,
  type DescMethod,
  type DescService,
  isMessage,
  type Message,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from "@bufbuild/protobuf";
import { anyPack } from "@bufbuild/protobuf/wkt";
import * as grpc from "@grpc/grpc-js";
import { MAX_MESSAGE_BYTES } from "./channel.js";
import { Tokenwire, type TokenwireOptions } from "./client.js";
import { DETAILS_KEY, PUSHBACK_KEY, REQUEST_ID_KEY, type StatusCode } from "./errors.js";
import {
  BadRequestSchema,
  ErrorInfoSchema,
  RetryInfoSchema,
} from "./gen/google/rpc/error_details_pb.js";
import { type Status, StatusSchema } from "./gen/google/rpc/status_pb.js";
import { FinishReason, type Usage, UsageSchema } from "./gen/tokenwire/v1/chat_pb.js";
import {
  type BatchChatRequest,
  BatchChatResponseSchema,
  type ChatRequest,
  ChatRequestSchema,
  type ChatResponse,
  ChatService,
  type Delta,
  DeltaSchema,
  Snapshot_State,
  type StreamChatRequest,
  type StreamChatResponse,
  StreamChatResponseSchema,
  StreamMode,
} from "./gen/tokenwire/v1/chat_service_pb.js";
import {
  type GetModelRequest,
  GetModelResponseSchema,
  type ListModelsRequest,
  ListModelsResponseSchema,
  type Model,
  ModelSchema,
  ModelService,
} from "./gen/tokenwire/v1/model_service_pb.js";
import {
  type CountTokensRequest,
  CountTokensResponseSchema,
  type TokenizeRequest,
  TokenizeResponseSchema,
  TokenizerService,
} from "./gen/tokenwire/v1/tokenizer_service_pb.js";
import { Accumulator, type FinishReason as FinishReasonName } from "./replies.js";
import { durationOf } from "./requests.js";
import { deserializer, pathOf, serializer } from "./rpc.js";

/** Text, a Delta, or any event; an empty StreamChatResponse is a heartbeat. */
export type Part = string | Delta | StreamChatResponse;

/** The status code that goes with each reason, as error_reason.proto says. */
export const CODES = {
  INVALID_REQUEST: "INVALID_ARGUMENT",
  CONTEXT_LENGTH_EXCEEDED: "INVALID_ARGUMENT",
  UNSUPPORTED_PARAMETER: "INVALID_ARGUMENT",
  UNKNOWN_ROLE: "INVALID_ARGUMENT",
  REQUEST_TOO_LARGE: "RESOURCE_EXHAUSTED",
  CONTENT_FILTERED: "INVALID_ARGUMENT",
  MODEL_NOT_FOUND: "NOT_FOUND",
  CALLER_UNAUTHENTICATED: "UNAUTHENTICATED",
  CALLER_FORBIDDEN: "PERMISSION_DENIED",
  CALLER_QUOTA_EXCEEDED: "RESOURCE_EXHAUSTED",
  RATE_LIMITED: "RESOURCE_EXHAUSTED",
  UPSTREAM_QUOTA_EXHAUSTED: "RESOURCE_EXHAUSTED",
  UPSTREAM_CREDENTIALS_REJECTED: "FAILED_PRECONDITION",
  UPSTREAM_ACCESS_DENIED: "FAILED_PRECONDITION",
  UPSTREAM_UNREACHABLE: "UNAVAILABLE",
  UPSTREAM_TIMEOUT: "UNAVAILABLE",
  UPSTREAM_OVERLOADED: "UNAVAILABLE",
  UPSTREAM_ERROR: "UNAVAILABLE",
  UPSTREAM_PROTOCOL_ERROR: "UNAVAILABLE",
  UPSTREAM_STREAM_INTERRUPTED: "UNAVAILABLE",
  GATEWAY_OVERLOADED: "UNAVAILABLE",
  GATEWAY_DRAINING: "UNAVAILABLE",
  DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
  CANCELLED: "CANCELLED",
  CALLER_STALLED: "ABORTED",
  TOKENIZER_UNAVAILABLE: "FAILED_PRECONDITION",
  INTERNAL: "INTERNAL",
} as const satisfies Readonly<Record<string, StatusCode>>;

/** A reason from `ErrorReason`. */
export type Reason = keyof typeof CODES;

// What another instance may serve at once: the gateway leaves these to the client's retries.
const ELSEWHERE: readonly string[] = ["GATEWAY_OVERLOADED", "GATEWAY_DRAINING"];

/** A part that calls a function; `args` is text as is, anything else as JSON. */
export function toolCall(
  name: string,
  args: unknown,
  { id = "call_1", index = 0 }: { id?: string; index?: number } = {},
): Delta {
  const text = typeof args === "string" ? args : JSON.stringify(args);
  return create(DeltaSchema, { toolCalls: [{ index, id, name, arguments: text }] });
}

/** The empty event a silent stream carries to stay alive. */
export function heartbeat(): StreamChatResponse {
  return create(StreamChatResponseSchema);
}

/** How `fail` fails. */
export interface FailOptions {
  /** What arrives before the failure, if the call streams. */
  after?: readonly Part[];
  /** For people. */
  message?: string;
  /** The reason's own unless given. */
  code?: StatusCode;
  /** Sent as RetryInfo. */
  retryAfterMs?: number;
  /** Path to description, sent as BadRequest. */
  fieldViolations?: Readonly<Record<string, string>>;
  /** Of the ErrorInfo. */
  metadata?: Readonly<Record<string, string>>;
  /**
   * What the client's own retries are told; unless given it is the gateway's way: nothing where
   * another instance may help, else `retryAfterMs`, else -1, for no retry.
   */
  pushbackMs?: number;
}

/** One RPC as it arrived. */
export class ReceivedCall {
  /** For example "StreamChat". */
  readonly method: string;
  /** The request message. */
  readonly message: Message;
  /** First value of each name. */
  readonly metadata: Readonly<Record<string, string | Uint8Array>>;
  #over: () => void = () => {};
  readonly #ended = new Promise<void>((resolve) => {
    this.#over = resolve;
  });
  #isOver = false;
  #cancelled = false;

  /** @internal */
  constructor(method: string, message: Message, metadata: ReceivedCall["metadata"]) {
    this.method = method;
    this.message = message;
    this.metadata = metadata;
  }

  /** The ChatRequest of a Chat or a StreamChat; throws Error for another call. */
  get request(): ChatRequest {
    if (isMessage(this.message, ChatRequestSchema)) return this.message;
    const { chat } = this.message as Partial<StreamChatRequest>;
    if (chat === undefined) throw new Error(`${this.method} has no ChatRequest: see .message`);
    return chat;
  }

  /** The request message as one of `schema`; throws Error if it is another. */
  as<D extends DescMessage>(schema: D): MessageShape<D> {
    if (isMessage(this.message, schema)) return this.message;
    throw new Error(`${this.method} takes a ${this.message.$typeName}, no ${schema.typeName}`);
  }

  /** Waits for the call to be over; whether the caller left before its end. */
  async waitCancelled(timeoutMs = 10_000): Promise<boolean> {
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, timeoutMs);
    });
    await Promise.race([this.#ended, late]);
    clearTimeout(timer);
    return this.#cancelled;
  }

  /** @internal */
  finish(cancelled: boolean): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#cancelled = cancelled;
    this.#over();
  }
}

interface Failure {
  status: Status;
  pushbackMs: number | undefined;
}

interface Script {
  parts: readonly StreamChatResponse[];
  ending: "whole" | "cut" | "hang" | Failure;
  finishReason: FinishReasonName;
  usage: Usage | undefined;
}

type ServerCall =
  | grpc.ServerUnaryCall<Message, Message>
  | grpc.ServerWritableStream<Message, Message>;

/**
 * Answers calls from a script, in the order they were scripted.
 *
 * Each Chat, StreamChat, retry of one, or item of a BatchChat takes the next answer; a call that
 * finds none fails with INTERNAL.
 */
export class FakeGateway implements AsyncDisposable {
  /** Every RPC received, oldest first. */
  readonly calls: ReceivedCall[] = [];
  readonly #script: Script[] = [];
  readonly #token: string;
  readonly #models: readonly string[];
  readonly #server = new grpc.Server({
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
  });
  #target = "";

  private constructor(token: string, models: readonly string[]) {
    this.#token = token;
    this.#models = models;
  }

  /** A gateway that listens. `token`: what callers must present; `models`: what there is. */
  static async start(options: { token?: string; models?: readonly string[] } = {}) {
    const gateway = new FakeGateway(options.token ?? "", options.models ?? ["gpt-4o-mini"]);
    await gateway.#listen();
    return gateway;
  }

  /** HOST:PORT to connect to. */
  get target(): string {
    return this.#target;
  }

  // --- the script

  /** Answer the next call with these parts: "stop", or "tool_calls" after tool calls. */
  reply(...parts: readonly Part[]): this {
    return this.replyWith(parts);
  }

  /** Like `reply`, with a finish reason or usage of your own. */
  replyWith(
    parts: readonly Part[],
    more: { finishReason?: FinishReasonName; usage?: MessageInitShape<typeof UsageSchema> } = {},
  ): this {
    const usage = more.usage && create(UsageSchema, more.usage);
    return this.#add(parts, "whole", more.finishReason, usage);
  }

  /**
   * Fail the next call, as the gateway does, after the parts in `after` if it streams.
   *
   * `reason` is from ErrorReason; "" for a status without details, as a proxy sends, whose `code`
   * is UNAVAILABLE unless given.
   */
  fail(reason: Reason | "", options: FailOptions = {}): this {
    const { retryAfterMs, fieldViolations } = options;
    const details: Status["details"] = [];
    if (retryAfterMs !== undefined) {
      const info = create(RetryInfoSchema, { retryDelay: durationOf(retryAfterMs) });
      details.push(anyPack(RetryInfoSchema, info));
    }
    if (fieldViolations !== undefined) {
      const refused = create(BadRequestSchema, {
        fieldViolations: Object.entries(fieldViolations).map(([field, description]) => ({
          field,
          description,
        })),
      });
      details.push(anyPack(BadRequestSchema, refused));
    }
    let { pushbackMs } = options;
    if (pushbackMs === undefined && reason !== "" && !ELSEWHERE.includes(reason)) {
      pushbackMs = retryAfterMs ?? -1;
    }
    const status = statusOf(reason, options.message ?? "scripted by the test", options, details);
    return this.#add(options.after ?? [], { status, pushbackMs });
  }

  /**
   * Answer with these parts, then end with OK although the answer is not whole.
   *
   * The gateway never does this; a broken proxy might. Streams only: a unary call fails with
   * UPSTREAM_STREAM_INTERRUPTED.
   */
  cut(...parts: readonly Part[]): this {
    return this.#add(parts, "cut");
  }

  /** Answer with these parts, then stay silent until the caller leaves. */
  hang(...parts: readonly Part[]): this {
    return this.#add(parts, "hang");
  }

  #add(
    parts: readonly Part[],
    ending: Script["ending"],
    finishReason?: FinishReasonName,
    usage?: Usage,
  ): this {
    const events = parts.map(eventOf);
    const calls = events.some(
      ({ event }) => event.case === "delta" && event.value.toolCalls.length,
    );
    const reason = finishReason ?? (calls ? "tool_calls" : "stop");
    this.#script.push({ parts: events, ending, finishReason: reason, usage });
    return this;
  }

  #next(): Script {
    const message = "FakeGateway has no answer left: script one with reply, fail, cut or hang";
    const none = { status: statusOf("INTERNAL", message), pushbackMs: -1 };
    return (
      this.#script.shift() ?? { parts: [], ending: none, finishReason: "stop", usage: undefined }
    );
  }

  // --- the server

  /** A client of this gateway; without a token unless `options` has one. */
  client(options: TokenwireOptions = {}): Tokenwire {
    return new Tokenwire({ target: this.target, token: "", ...options });
  }

  /** Cancel what runs and free the port. */
  async close(): Promise<void> {
    this.#server.forceShutdown();
    for (const call of this.calls) call.finish(false);
  }

  /** For `await using`: closes. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #listen(): Promise<void> {
    for (const service of [ChatService, TokenizerService, ModelService]) this.#serve(service);
    const port = await new Promise<number>((resolve, reject) => {
      const credentials = grpc.ServerCredentials.createInsecure();
      this.#server.bindAsync("127.0.0.1:0", credentials, (error, bound) => {
        if (error) reject(error);
        else resolve(bound);
      });
    });
    this.#target = `127.0.0.1:${port}`;
  }

  #serve(service: DescService): void {
    const definition: Record<string, grpc.MethodDefinition<Message, Message>> = {};
    const handlers: grpc.UntypedServiceImplementation = {};
    for (const method of service.methods) {
      const isStream = method.methodKind === "server_streaming";
      definition[method.localName] = {
        path: pathOf(method),
        requestStream: false,
        responseStream: isStream,
        requestSerialize: serializer(method.input),
        requestDeserialize: deserializer(method.input),
        responseSerialize: serializer(method.output),
        responseDeserialize: deserializer(method.output),
      };
      handlers[method.localName] = isStream
        ? (call: grpc.ServerWritableStream<Message, Message>) => this.#onStream(method, call)
        : (call: grpc.ServerUnaryCall<Message, Message>, answer: grpc.sendUnaryData<Message>) =>
            this.#onUnary(method, call, answer);
    }
    this.#server.addService(definition, handlers);
  }

  #onUnary(
    method: DescMethod,
    call: grpc.ServerUnaryCall<Message, Message>,
    answer: grpc.sendUnaryData<Message>,
  ): void {
    const received = this.#accept(method, call);
    const result = this.#refused(received) ?? this.#answer(method, call.request);
    if (result === undefined) return; // it hangs
    received.finish(false);
    if (isMessage(result)) answer(null, result, trailers(received));
    else answer(serviceError(result, received));
  }

  #onStream(method: DescMethod, call: grpc.ServerWritableStream<Message, Message>): void {
    const received = this.#accept(method, call);
    const refused = this.#refused(received);
    const ending =
      refused ??
      (method === ChatService.method.streamChat
        ? this.#stream(call.request as StreamChatRequest, (event) => call.write(event))
        : this.#batch(call.request as BatchChatRequest, (result) => call.write(result)));
    if (ending === "hang") return;
    received.finish(false);
    if (typeof ending === "object") call.emit("error", serviceError(ending, received));
    else call.end(trailers(received));
  }

  #accept(method: DescMethod, call: ServerCall): ReceivedCall {
    const received = new ReceivedCall(method.name, call.request, call.metadata.getMap());
    this.calls.push(received);
    call.on("cancelled", () => received.finish(true));
    return received;
  }

  #refused(received: ReceivedCall): Failure | undefined {
    if (!this.#token || received.metadata["authorization"] === `Bearer ${this.#token}`) {
      return undefined;
    }
    return refusal("CALLER_UNAUTHENTICATED", "missing or wrong token");
  }

  /** The answer to a unary call; undefined when it hangs. */
  #answer(method: DescMethod, request: Message): Message | Failure | undefined {
    switch (method) {
      case ChatService.method.chat:
        return this.#fold(this.#next(), request as ChatRequest);
      case TokenizerService.method.countTokens:
        return counted(request as CountTokensRequest);
      case TokenizerService.method.tokenize:
        return tokenized(request as TokenizeRequest);
      case ModelService.method.listModels:
        return this.#listModels(request as ListModelsRequest);
      default:
        return this.#getModel(request as GetModelRequest);
    }
  }

  #stream(request: StreamChatRequest, write: (event: StreamChatResponse) => void) {
    const script = this.#next();
    const failsAtOnce = typeof script.ending === "object" && script.parts.length === 0;
    const answer = new Accumulator();
    for (const event of failsAtOnce ? [] : this.#events(script, request.chat)) {
      answer.add(event);
      const { case: kind, value } = event.event;
      if (request.mode === StreamMode.CUMULATIVE && kind === "delta") {
        write(snapshotOf(answer, value.choiceIndex));
      } else {
        write(event);
      }
    }
    return script.ending;
  }

  #batch(request: BatchChatRequest, write: (result: Message) => void): "whole" | "hang" {
    const scripts = request.items.map(() => this.#next());
    // Last item first: results come in order of completion, and code that takes it for the order
    // of the items should notice in a test.
    for (const [index, { customId, chat }] of [...request.items.entries()].reverse()) {
      const result = this.#fold(scripts[index] as Script, chat);
      if (result === undefined) return "hang";
      write(
        create(BatchChatResponseSchema, {
          index,
          customId,
          result: isMessage(result)
            ? { case: "response", value: result }
            : { case: "error", value: result.status },
        }),
      );
    }
    return "whole";
  }

  *#events(script: Script, chat: ChatRequest | undefined): Generator<StreamChatResponse> {
    const id = `fake-${this.calls.length}`;
    const header = { id, model: chat?.model ?? "", upstream: "fake" };
    yield create(StreamChatResponseSchema, { event: { case: "header", value: header } });
    yield* script.parts;
    if (script.ending !== "whole") return;
    const finishReasonRaw = script.finishReason;
    const name = finishReasonRaw.toUpperCase() as keyof typeof FinishReason;
    const begun = new Set<number>();
    const finished = new Set<number>();
    for (const { event } of script.parts) {
      if (event.case === "delta") begun.add(event.value.choiceIndex);
      if (event.case === "finish") finished.add(event.value.choiceIndex);
    }
    if (begun.size === 0) begun.add(0);
    for (const choiceIndex of [...begun].sort((a, b) => a - b)) {
      if (finished.has(choiceIndex)) continue;
      const value = { choiceIndex, finishReason: FinishReason[name], finishReasonRaw };
      yield create(StreamChatResponseSchema, { event: { case: "finish", value } });
    }
    const usage = script.usage ?? usageOf(script, chat);
    yield create(StreamChatResponseSchema, { event: { case: "trailer", value: { usage } } });
  }

  /** The whole answer of a script; undefined when it hangs. */
  #fold(script: Script, chat: ChatRequest | undefined): ChatResponse | Failure | undefined {
    if (script.ending === "hang") return undefined;
    if (script.ending === "cut") return refusal("UPSTREAM_STREAM_INTERRUPTED", "cut by the test");
    if (script.ending !== "whole") return script.ending;
    const answer = new Accumulator();
    for (const event of this.#events(script, chat)) answer.add(event);
    return answer.soFar().proto;
  }

  #listModels(request: ListModelsRequest): Message {
    const start = Number(request.pageToken || 0);
    const end = start + (request.pageSize || 100);
    return create(ListModelsResponseSchema, {
      models: this.#models.slice(start, end).map(modelOf),
      nextPageToken: end < this.#models.length ? String(end) : "",
    });
  }

  #getModel({ name }: GetModelRequest): Message | Failure {
    if (!this.#models.includes(name)) return refusal("MODEL_NOT_FOUND", `no model "${name}"`);
    return create(GetModelResponseSchema, { model: modelOf(name) });
  }
}

function eventOf(part: Part): StreamChatResponse {
  if (isMessage(part, StreamChatResponseSchema)) return part;
  const value = typeof part === "string" ? create(DeltaSchema, { content: part }) : part;
  return create(StreamChatResponseSchema, { event: { case: "delta", value } });
}

function snapshotOf(answer: Accumulator, choiceIndex: number): StreamChatResponse {
  const message = answer.choices.find((choice) => choice.index === choiceIndex)?.message;
  const value = { state: Snapshot_State.STREAMING, choiceIndex, ...(message && { message }) };
  return create(StreamChatResponseSchema, { event: { case: "snapshot", value } });
}

function words(text: string): string[] {
  return text.split(/\s+/u).filter(Boolean);
}

function usageOf(script: Script, chat: ChatRequest | undefined): Usage {
  const prompt = (chat?.messages ?? []).flatMap(({ content = "" }) => words(content)).length;
  const answer = words(
    script.parts.map(({ event }) => (event.case === "delta" ? event.value.content : "")).join(""),
  ).length;
  return create(UsageSchema, {
    promptTokens: prompt,
    completionTokens: answer,
    totalTokens: prompt + answer,
    estimated: true,
  });
}

function counted({ input }: CountTokensRequest): Message {
  const texts =
    input.case === "text"
      ? [input.value]
      : (input.value?.messages ?? []).map(({ content = "" }) => content);
  return create(CountTokensResponseSchema, {
    totalTokens: texts.flatMap(words).length,
    tokenizer: "words",
  });
}

function tokenized({ texts }: TokenizeRequest): Message {
  const encoder = new TextEncoder();
  return create(TokenizeResponseSchema, {
    tokenizer: "words",
    lists: texts.map((text) => {
      const pieces = words(text).map((word) => encoder.encode(word));
      return { ids: [...pieces.keys()], pieces };
    }),
  });
}

function modelOf(name: string): Model {
  return create(ModelSchema, { name, upstream: "fake", upstreamModel: name, tokenizer: "words" });
}

// --- failures -------------------------------------------------------------------------

function refusal(reason: Reason, message: string): Failure {
  return { status: statusOf(reason, message), pushbackMs: -1 };
}

function statusOf(
  reason: Reason | "",
  message: string,
  more: Pick<FailOptions, "code" | "metadata"> = {},
  details: Status["details"] = [],
): Status {
  const code = more.code ?? (reason === "" ? "UNAVAILABLE" : CODES[reason]);
  const info = create(ErrorInfoSchema, {
    reason,
    domain: "tokenwire",
    metadata: more.metadata ?? {},
  });
  return create(StatusSchema, {
    code: grpc.status[code],
    message,
    details: reason === "" ? details : [anyPack(ErrorInfoSchema, info), ...details],
  });
}

function trailers(received: ReceivedCall): grpc.Metadata {
  const metadata = new grpc.Metadata();
  const requestId = received.metadata[REQUEST_ID_KEY];
  if (typeof requestId === "string") metadata.set(REQUEST_ID_KEY, requestId);
  return metadata;
}

function serviceError({ status, pushbackMs }: Failure, received: ReceivedCall): grpc.ServiceError {
  const metadata = trailers(received);
  if (status.details.length > 0) {
    metadata.set(DETAILS_KEY, Buffer.from(toBinary(StatusSchema, status)));
  }
  if (pushbackMs !== undefined) metadata.set(PUSHBACK_KEY, String(pushbackMs));
  const { code, message: details } = status;
  return Object.assign(new Error(details), { code, details, metadata });
}
