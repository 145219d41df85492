/** Answers: whole, or growing event by event into the same shape. */

import { clone, create, type MessageInitShape } from "@bufbuild/protobuf";
import { timestampDate } from "@bufbuild/protobuf/wkt";
import {
  type Annotation,
  type ChatMessage,
  ChatMessageSchema,
  FinishReason as FinishReasonProto,
  type TokenLogprob,
  type ToolCall as ToolCallProto,
  ToolCallSchema,
  type Usage as UsageProto,
} from "./gen/tokenwire/v1/chat_pb.js";
import {
  type ChatResponse,
  ChatResponseSchema,
  type Choice as ChoiceProto,
  ChoiceSchema,
  type Delta,
  type ResponseHeader,
  ResponseHeaderSchema,
  type StreamChatResponse,
  type StreamTrailer,
} from "./gen/tokenwire/v1/chat_service_pb.js";
import { ErrorReason } from "./gen/tokenwire/v1/error_reason_pb.js";

/**
 * What turns parsed JSON into a type of yours, or throws: a function, or an object with `parse`
 * such as a zod schema.
 */
export type Parser<T> = ((value: unknown) => T) | { parse(value: unknown): T };

/** Why a choice ended; "" while it grows. The upstream's own word is `proto.finishReasonRaw`. */
export type FinishReason = "" | "stop" | "length" | "tool_calls" | "content_filter" | "other";

/** Tokens used by one call. */
export interface Usage {
  /** Input tokens, cached ones included. */
  readonly promptTokens: number;
  /** Output tokens, reasoning included. */
  readonly completionTokens: number;
  /** Sum reported by the upstream. */
  readonly totalTokens: number;
  /** Part of `promptTokens` read from a cache, if reported. */
  readonly cachedPromptTokens?: number | undefined;
  /** Part of `promptTokens` written to a cache, if reported. */
  readonly cacheWriteTokens?: number | undefined;
  /** Part of `completionTokens` spent on reasoning, if reported. */
  readonly reasoningTokens?: number | undefined;
  /** True when the gateway counted because the upstream did not report. */
  readonly estimated: boolean;
}

/** One try at one upstream with one key. */
export interface UpstreamAttempt {
  /** Configured upstream. */
  readonly upstream: string;
  /** Configured name or fingerprint of the key. */
  readonly keyId: string;
  /** HTTP status; undefined when none arrived. */
  readonly httpStatus: number | undefined;
  /** How it failed, for example "RATE_LIMITED"; "" for the attempt that answers. */
  readonly errorReason: string;
  /** From sending the request to the first byte of the answer or to failure. */
  readonly durationMs: number;
}

/** Facts known once, before any text. */
export interface Header {
  /** Identifier of the response. */
  readonly id: string;
  /** Model that answers, after aliases and fallback. */
  readonly model: string;
  /** Configured upstream that answers. */
  readonly upstream: string;
  /** When the upstream started. */
  readonly createTime: Date | undefined;
  /** Upstream build identifier. */
  readonly systemFingerprint: string;
  /** Tier used. */
  readonly serviceTier: string;
  /** Cap in force for this call; undefined when none. */
  readonly maxCompletionTokens: number | undefined;
  /** Request fields that were dropped. */
  readonly droppedParameters: readonly string[];
  /** Upstream attempts made before the answer began, the one that answers last. */
  readonly attempts: readonly UpstreamAttempt[];
}

/** A call the model wants made. */
export class ToolCall {
  /** The contract's message. */
  readonly proto: ToolCallProto;

  constructor(proto: ToolCallProto) {
    this.proto = proto;
  }

  /** What the answering message repeats; `answer` does that. */
  get id(): string {
    return this.proto.id;
  }

  /** Name of the tool. */
  get name(): string {
    return this.proto.call.value?.name ?? "";
  }

  /** Whether this calls a free-form tool, whose input is text rather than JSON. */
  get isCustom(): boolean {
    return this.proto.call.case === "custom";
  }

  /** Exactly what the model wrote: usually JSON text; the input of a custom tool. */
  get rawArguments(): string {
    const { call } = this.proto;
    return call.case === "custom" ? call.value.input : (call.value?.argumentsJson ?? "");
  }

  /**
   * The arguments, parsed; no text counts as no arguments.
   *
   * Throws SyntaxError when the model wrote something other than a JSON object.
   */
  get arguments(): Record<string, unknown> {
    const text = this.rawArguments;
    if (text.trim() === "" && !this.isCustom) return {};
    return parsedObject(text, `arguments of the call of "${this.name}" (${this.id})`);
  }

  /** The arguments as a type of yours; throws as `arguments` does, and whatever `parser` throws. */
  parse<T>(parser: Parser<T>): T {
    return applied(parser, this.arguments);
  }

  /** The message that gives the model `result`: text as is, anything else as JSON. */
  answer(result: unknown): ChatMessage {
    const content = typeof result === "string" ? result : (JSON.stringify(result) ?? "null");
    return create(ChatMessageSchema, { role: "tool", toolCallId: this.id, content });
  }
}

/** One of the answers to one request; `T` is what its `json()` returns. */
export class Choice<T = unknown> {
  /** The contract's message. */
  readonly proto: ChoiceProto;
  readonly #parser: Parser<T> | undefined;

  constructor(proto: ChoiceProto, parser?: Parser<T>) {
    this.proto = proto;
    this.#parser = parser;
  }

  /** Position, from 0. */
  get index(): number {
    return this.proto.index;
  }

  /** The whole message; append it to the conversation to go on. */
  get message(): ChatMessage {
    return this.proto.message ?? create(ChatMessageSchema);
  }

  /** The answer; "" when there is none, as when the model only calls tools. */
  get text(): string {
    return this.proto.message?.content ?? "";
  }

  /** What the model showed of its reasoning; usually "". */
  get reasoning(): string {
    return this.proto.message?.reasoning ?? "";
  }

  /** Why the model declined; usually "". */
  get refusal(): string {
    return this.proto.message?.refusal ?? "";
  }

  /** Calls the model wants made. */
  get toolCalls(): readonly ToolCall[] {
    return (this.proto.message?.toolCalls ?? []).map((call) => new ToolCall(call));
  }

  /** Why it ended; "" while it grows. */
  get finishReason(): FinishReason {
    if (this.proto.finishReason === FinishReasonProto.UNSPECIFIED) return "";
    const name = FinishReasonProto[this.proto.finishReason];
    return name === undefined ? "other" : (name.toLowerCase() as FinishReason);
  }

  /**
   * The text, parsed as JSON: for the options `jsonSchema` and `responseFormat: "json_object"`.
   *
   * Throws SyntaxError when the text is not JSON, as after `finishReason` "length", and whatever
   * the parser throws: the one given here, else that of {@link jsonSchema}.
   */
  json(): T;
  json<U>(parser: Parser<U>): U;
  json(parser: Parser<unknown> | undefined = this.#parser): unknown {
    const value = parsed(this.text, `answer (finishReason "${this.finishReason}")`);
    return parser === undefined ? value : applied(parser, value);
  }
}

/** Shortcuts to the first choice, for whatever has choices. */
export abstract class Answer<T = unknown> {
  /** Answers, by index: one unless `choiceCount` asked for more. */
  abstract get choices(): readonly Choice<T>[];

  /** The first choice; an empty one when there is none. */
  get first(): Choice<T> {
    return this.choices[0] ?? new Choice<T>(create(ChoiceSchema));
  }

  /** The first choice's message; append it to the conversation to go on. */
  get message(): ChatMessage {
    return this.first.message;
  }

  /** The first choice's text. */
  get text(): string {
    return this.first.text;
  }

  /** The first choice's reasoning. */
  get reasoning(): string {
    return this.first.reasoning;
  }

  /** The first choice's refusal. */
  get refusal(): string {
    return this.first.refusal;
  }

  /** The first choice's tool calls. */
  get toolCalls(): readonly ToolCall[] {
    return this.first.toolCalls;
  }

  /** Why the first choice ended, see {@link Choice.finishReason}. */
  get finishReason(): FinishReason {
    return this.first.finishReason;
  }

  /** The first choice's text, parsed as JSON, see {@link Choice.json}. */
  json(): T;
  json<U>(parser: Parser<U>): U;
  json(parser?: Parser<unknown>): unknown {
    return parser === undefined ? this.first.json() : this.first.json(parser);
  }
}

/** A whole answer, or within an error what had arrived of one. */
export class Reply<T = unknown> extends Answer<T> {
  /** The contract's message. */
  readonly proto: ChatResponse;
  /** The call's `x-request-id`. */
  readonly requestId: string;
  /** Answers, by index. */
  readonly choices: readonly Choice<T>[];

  constructor(proto: ChatResponse, requestId = "", parser?: Parser<T>) {
    super();
    this.proto = proto;
    this.requestId = requestId;
    this.choices = proto.choices.map((choice) => new Choice(choice, parser));
  }

  /** Model, upstream, attempts, dropped parameters. */
  get header(): Header {
    return headerOf(this.proto.header ?? create(ResponseHeaderSchema));
  }

  /** Tokens used; zeros when nobody reported them. */
  get usage(): Usage {
    return usageOf(this.proto.usage);
  }
}

/** One event of a stream. */
export class StreamEvent {
  /** The contract's message. */
  readonly proto: StreamChatResponse;
  /** What it is. */
  readonly kind: "header" | "delta" | "snapshot" | "finish" | "trailer";
  /** New answer text, in either mode; "" for an event without any. */
  readonly text: string;

  constructor(proto: StreamChatResponse, kind: StreamEvent["kind"], text: string) {
    this.proto = proto;
    this.kind = kind;
    this.text = text;
  }

  /** Choice this belongs to; 0 for header and trailer. */
  get choiceIndex(): number {
    const { value } = this.proto.event;
    return value !== undefined && "choiceIndex" in value ? value.choiceIndex : 0;
  }

  /** New reasoning text; empty with mode "cumulative", where the stream has it. */
  get reasoning(): string {
    const { event } = this.proto;
    return event.case === "delta" ? event.value.reasoning : "";
  }
}

/**
 * Folds the events of one stream into the answer so far. No I/O.
 *
 * A client's stream holds one; use it by itself to fold events that came another way.
 */
export class Accumulator<T = unknown> extends Answer<T> {
  readonly #growing = new Map<number, Growing>();
  readonly #parser: Parser<T> | undefined;
  #cached: readonly Choice<T>[] | undefined;
  #header: ResponseHeader | undefined;
  #trailer: StreamTrailer | undefined;

  constructor(parser?: Parser<T>) {
    super();
    this.#parser = parser;
  }

  /** Fold one event in; undefined for one to ignore: a heartbeat, or newer than this package. */
  add(proto: StreamChatResponse): StreamEvent | undefined {
    const { event } = proto;
    let text = "";
    switch (event.case) {
      case "delta":
        text = event.value.content;
        this.#choice(event.value.choiceIndex).append(event.value);
        break;
      case "snapshot":
        text = this.#choice(event.value.choiceIndex).replace(
          event.value.message ?? create(ChatMessageSchema),
        );
        break;
      case "finish": {
        const choice = this.#choice(event.value.choiceIndex);
        choice.finishReason = event.value.finishReason;
        choice.finishReasonRaw = event.value.finishReasonRaw;
        choice.extraJson = event.value.extraJson;
        break;
      }
      case "header":
        this.#header = event.value;
        break;
      case "trailer":
        this.#trailer = event.value;
        break;
      default:
        return undefined;
    }
    return new StreamEvent(proto, event.case, text);
  }

  /** Answers so far, by index. */
  get choices(): readonly Choice<T>[] {
    this.#cached ??= [...this.#growing]
      .sort(([a], [b]) => a - b)
      .map(([index, growing]) => new Choice(growing.proto(index), this.#parser));
    return this.#cached;
  }

  /** Model, upstream, attempts; undefined before the first event. */
  get header(): Header | undefined {
    return this.#header && headerOf(this.#header);
  }

  /** Whether the trailer has arrived: without it the answer is only a part. */
  get isComplete(): boolean {
    return this.#trailer !== undefined;
  }

  /** Tokens used; undefined before the trailer. */
  get usage(): Usage | undefined {
    return this.#trailer && usageOf(this.#trailer.usage);
  }

  /** What has arrived; see `isComplete`. */
  soFar(requestId = ""): Reply<T> {
    const init: MessageInitShape<typeof ChatResponseSchema> = {
      choices: this.choices.map((choice) => choice.proto),
    };
    if (this.#header !== undefined) init.header = this.#header;
    if (this.#trailer?.usage !== undefined) init.usage = this.#trailer.usage;
    const response = create(ChatResponseSchema, init);
    if (this.#trailer?.extraJson) {
      // What a whole answer has in its header, a stream learns when that has gone.
      const header = clone(ResponseHeaderSchema, this.#header ?? create(ResponseHeaderSchema));
      header.extraJson = merged(header.extraJson, this.#trailer.extraJson);
      response.header = header;
    }
    return new Reply(response, requestId, this.#parser);
  }

  #choice(index: number): Growing {
    this.#cached = undefined;
    let choice = this.#growing.get(index);
    if (choice === undefined) {
      choice = new Growing();
      this.#growing.set(index, choice);
    }
    return choice;
  }
}

/** One choice while it grows. V8 joins `+=` of text lazily, so that n deltas cost n. */
class Growing {
  content = "";
  reasoning = "";
  refusal = "";
  readonly calls = new Map<number, GrowingCall>();
  readonly logprobs: TokenLogprob[] = [];
  readonly annotations: Annotation[] = [];
  extras: string[] = [];
  whole: ChatMessage | undefined;
  finishReason = FinishReasonProto.UNSPECIFIED;
  finishReasonRaw = "";
  extraJson = "";

  append(delta: Delta): void {
    this.content += delta.content;
    this.reasoning += delta.reasoning;
    this.refusal += delta.refusal;
    for (const part of delta.toolCalls) {
      let call = this.calls.get(part.index);
      if (call === undefined) {
        call = { id: "", name: "", custom: false, arguments: "" };
        this.calls.set(part.index, call);
      }
      call.id ||= part.id;
      call.name ||= part.name;
      call.custom ||= part.custom;
      call.arguments += part.arguments;
    }
    this.logprobs.push(...delta.logprobs);
    this.annotations.push(...delta.annotations);
    if (delta.extraJson) this.extras.push(delta.extraJson);
  }

  /** Take a snapshot; returns the text that is new in it. */
  replace(message: ChatMessage): string {
    const before = this.whole?.content ?? "";
    this.whole = message;
    const text = message.content ?? "";
    return text.startsWith(before) ? text.slice(before.length) : text;
  }

  proto(index: number): ChoiceProto {
    return create(ChoiceSchema, {
      index,
      message: this.whole ?? this.#message(),
      finishReason: this.finishReason,
      finishReasonRaw: this.finishReasonRaw,
      logprobs: [...this.logprobs],
      extraJson: this.extraJson,
    });
  }

  #message(): ChatMessage {
    const calls = [...this.calls].sort(([a], [b]) => a - b).map(([, call]) => toolCall(call));
    const message = create(ChatMessageSchema, {
      role: "assistant",
      toolCalls: calls,
      annotations: [...this.annotations],
    });
    if (this.refusal) message.refusal = this.refusal;
    if (this.reasoning) message.reasoning = this.reasoning;
    // A turn that only calls tools has null content, not an empty one.
    if (this.content || (calls.length === 0 && !this.refusal)) message.content = this.content;
    if (this.extras.length > 1) {
      this.extras = [JSON.stringify(this.extras.map(extra).reduce(appended))];
    }
    message.extraJson = this.extras[0] ?? "";
    return message;
  }
}

interface GrowingCall {
  id: string;
  name: string;
  custom: boolean;
  arguments: string;
}

function toolCall(call: GrowingCall): ToolCallProto {
  const { id, name } = call;
  return create(ToolCallSchema, {
    id,
    call: call.custom
      ? { case: "custom", value: { name, input: call.arguments } }
      : { case: "function", value: { name, argumentsJson: call.arguments } },
  });
}

/** Plain facts of a usage message. */
export function usageOf(proto: UsageProto | undefined): Usage {
  return {
    promptTokens: proto?.promptTokens ?? 0,
    completionTokens: proto?.completionTokens ?? 0,
    totalTokens: proto?.totalTokens ?? 0,
    cachedPromptTokens: proto?.cachedPromptTokens,
    cacheWriteTokens: proto?.cacheWriteTokens,
    reasoningTokens: proto?.reasoningTokens,
    estimated: proto?.estimated ?? false,
  };
}

function headerOf(proto: ResponseHeader): Header {
  return {
    id: proto.id,
    model: proto.model,
    upstream: proto.upstream,
    createTime: proto.createTime && timestampDate(proto.createTime),
    systemFingerprint: proto.systemFingerprint,
    serviceTier: proto.serviceTier,
    maxCompletionTokens: proto.maxCompletionTokens || undefined,
    droppedParameters: proto.droppedParameters,
    attempts: proto.attempts.map((attempt) => ({
      upstream: attempt.upstream,
      keyId: attempt.keyId,
      httpStatus: attempt.httpStatus || undefined,
      errorReason:
        attempt.errorReason === ErrorReason.UNSPECIFIED
          ? ""
          : (ErrorReason[attempt.errorReason] ?? String(attempt.errorReason)),
      durationMs:
        Number(attempt.duration?.seconds ?? 0) * 1000 + (attempt.duration?.nanos ?? 0) / 1e6,
    })),
  };
}

// --- JSON -----------------------------------------------------------------------------

type JsonObject = Record<string, unknown>;

function isObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Delta semantics for JSON nobody has modelled: text and lists grow, objects merge. */
function appended(before: JsonObject, now: JsonObject): JsonObject {
  const all = new Map(Object.entries(before));
  for (const [key, value] of Object.entries(now)) {
    const old = all.get(key);
    if (isObject(old) && isObject(value)) all.set(key, appended(old, value));
    else if (typeof old === "string" && typeof value === "string") all.set(key, old + value);
    else if (Array.isArray(old) && Array.isArray(value)) all.set(key, [...old, ...value]);
    else all.set(key, value);
  }
  return Object.fromEntries(all);
}

/** Unmodelled fields; they are a courtesy, and must not cost the answer. */
function extra(text: string): JsonObject {
  try {
    return text ? parsedObject(text, "extra_json") : {};
  } catch {
    return {};
  }
}

function merged(before: string, after: string): string {
  return before ? JSON.stringify({ ...extra(before), ...extra(after) }) : after;
}

function applied<T>(parser: Parser<T>, value: unknown): T {
  return typeof parser === "function" ? parser(value) : parser.parse(value);
}

function parsed(text: string, what: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    throw new SyntaxError(`the ${what} is not JSON: ${why}: ${start(text)}`);
  }
}

function parsedObject(text: string, what: string): JsonObject {
  const value = parsed(text, what);
  if (!isObject(value)) throw new SyntaxError(`the ${what} is not a JSON object: ${start(text)}`);
  return value;
}

function start(text: string): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}…` : text);
}
