/**
 * Requests of the contract, built from what TypeScript developers have at hand.
 *
 * Ranges are the server's to judge: it names the field and knows the model. Here only types are
 * checked, so that a mistake is told before anything is sent, with its place.
 */

import { clone, create, isMessage } from "@bufbuild/protobuf";
import { type Duration, DurationSchema } from "@bufbuild/protobuf/wkt";
import {
  type Annotation,
  AnnotationSchema,
  type ChatMessage,
  ChatMessageSchema,
  type ContentPart as ContentPartProto,
  ContentPartSchema,
  type FunctionTool,
  FunctionToolSchema,
  type GenerationParams,
  GenerationParamsSchema,
  type JsonSchemaFormat,
  JsonSchemaFormatSchema,
  type Media,
  MediaSchema,
  type ResponseFormat,
  ResponseFormatSchema,
  type RoleTemplate as RoleTemplateProto,
  RoleTemplateSchema,
  type ToolCall as ToolCallProto,
  ToolCallSchema,
  ToolChoice_Mode,
  type ToolChoice as ToolChoiceProto,
  ToolChoiceSchema,
  type Tool as ToolProto,
  ToolSchema,
} from "./gen/tokenwire/v1/chat_pb.js";
import {
  type BatchChatItem,
  BatchChatItemSchema,
  type BatchChatRequest,
  BatchChatRequestSchema,
  type ChatRequest,
  ChatRequestSchema,
  type StreamChatRequest,
  StreamChatRequestSchema,
  StreamMode,
  UnsupportedParameterPolicy,
} from "./gen/tokenwire/v1/chat_service_pb.js";
import {
  type CountTokensRequest,
  CountTokensRequestSchema,
  type TokenizeRequest,
  TokenizeRequestSchema,
} from "./gen/tokenwire/v1/tokenizer_service_pb.js";
import { Answer, Choice, type Parser, ToolCall } from "./replies.js";

/** A JSON object: as a JavaScript value, or as text that is sent unchanged. */
export type Json = Readonly<Record<string, unknown>> | string;

/** Bytes or a reference to them: exactly one of `data`, `url` and `fileId`. */
export interface MediaPart {
  /** What it is. */
  type: "image" | "audio" | "video" | "file";
  /** Inline bytes, with `mediaType`. */
  data?: Uint8Array;
  /** Absolute `https:` or `data:` URL. */
  url?: string;
  /** Identifier known to the upstream. */
  fileId?: string;
  /** IANA media type. */
  mediaType?: string;
  /** Display name. */
  filename?: string;
  /** Vendor rendering hint such as "low", "high" or "auto". */
  detail?: string;
}

/** One element of multimodal content: ours, or in the OpenAI layout. */
export type ContentPart =
  | string
  | MediaPart
  | ContentPartProto
  | { readonly type: string; readonly [field: string]: unknown };

/** One turn as a plain object. Names as in the OpenAI layout (`tool_call_id`) are taken, too. */
export interface MessageObject {
  /** "system", "developer", "user", "assistant", "tool", or one of `roleTemplates`. */
  role: string;
  /** Text, or parts; null for an assistant turn that only calls tools. */
  content?: string | readonly ContentPart[] | null;
  /** Participant name. */
  name?: string;
  /** Calls made by the assistant in this turn. */
  toolCalls?: readonly unknown[];
  /** For role "tool": the call this message answers. */
  toolCallId?: string;
  /** Reasoning the model showed before answering. */
  reasoning?: string;
  /** Anything else goes to the upstream unchanged. */
  [field: string]: unknown;
}

/** One turn: a plain object, an earlier answer, or a message of the contract. */
export type Message = MessageObject | Answer | Choice | ChatMessage;

/** One user message, a conversation (oldest first), or a ready request of the contract. */
export type Prompt = string | readonly Message[] | ChatRequest;

/** A function the model may call. */
export interface ToolDefinition {
  /** `^[a-zA-Z0-9_-]{1,64}$` */
  name: string;
  /** What it does, for the model. */
  description?: string;
  /** JSON Schema of the arguments; none without. */
  parameters?: Json;
  /** Ask the upstream to enforce the schema. */
  strict?: boolean;
}

/** A tool: a function, the OpenAI layout around it, or a message of the contract. */
export type Tool =
  | ToolDefinition
  | ToolProto
  | FunctionTool
  | { readonly type: string; readonly [field: string]: unknown };

/** How one caller role is written for the upstream. */
export interface RoleTemplate {
  /** Role as the caller writes it, for example "environment". */
  role: string;
  /** Role sent upstream, for example "system"; `role` unless given. */
  apiRole?: string;
  /** Text put before the content. */
  begin?: string;
  /** Text put after the content. */
  end?: string;
  /** Use the template of this role instead. */
  fallbackRole?: string;
}

/** A JSON Schema with the type its answers have; made by {@link jsonSchema}. */
export class AnswerSchema<T> {
  /** The schema. */
  readonly schema: Json;
  /** What makes a `T` of the parsed answer. */
  readonly parser: Parser<T> | undefined;
  /** Name, description and strictness, as the upstream gets them. */
  readonly options: JsonSchemaOptions;

  constructor(schema: Json, parser: Parser<T> | undefined, options: JsonSchemaOptions) {
    this.schema = schema;
    this.parser = parser;
    this.options = options;
  }
}

/** What goes with a JSON Schema. */
export interface JsonSchemaOptions {
  /** Default: made of the schema's title, else "answer". */
  name?: string;
  /** What it is for. */
  description?: string;
  /** Ask the upstream to enforce the schema. */
  strict?: boolean;
}

/**
 * A JSON Schema whose answers are of type `T`: give it as the option `jsonSchema`, and
 * `reply.json()` returns a `T`.
 *
 * `parser` checks the answer: a function from unknown to `T`, or an object with `parse`, such as a
 * zod schema (`jsonSchema(z.toJSONSchema(Weather), Weather)`). Without one the type is a promise
 * that only the upstream keeps.
 */
export function jsonSchema<T = unknown>(
  schema: Json,
  parser?: Parser<T>,
  options: JsonSchemaOptions = {},
): AnswerSchema<T> {
  return new AnswerSchema(schema, parser, options);
}

/** What every call takes. */
export interface CallOptions {
  /** Milliseconds until the call fails with DEADLINE_EXCEEDED; `Infinity` for no limit. */
  timeoutMs?: number | undefined;
  /** Cancels the call, here, at the gateway and at the upstream: its error is CANCELLED. */
  signal?: AbortSignal | undefined;
  /** `x-request-id`, to find the call in the gateway's log; made up when not given. */
  requestId?: string | undefined;
  /** More gRPC metadata, such as `traceparent`; bytes for names that end in `-bin`. */
  metadata?: Readonly<Record<string, string | Uint8Array>> | undefined;
}

/** What every chat takes; `T` is what `reply.json()` returns. Absence means the default. */
export interface ChatOptions<T = unknown> extends CallOptions {
  /** Name or alias of the model. */
  model?: string | undefined;
  /** Randomness, 0 to 2. */
  temperature?: number | null | undefined;
  /** Sample from the smallest set of tokens with this total probability, up to 1. */
  topP?: number | null | undefined;
  /** Sample from this many most likely tokens. */
  topK?: number | null | undefined;
  /** Drop tokens less likely than this share of the most likely one, 0 to 1. */
  minP?: number | null | undefined;
  /** Upper bound on generated tokens, reasoning included. */
  maxCompletionTokens?: number | null | undefined;
  /** Where to stop; never part of the text. */
  stop?: string | readonly string[] | null | undefined;
  /** Added per earlier occurrence of a token, -2 to 2; 0 is neutral. */
  frequencyPenalty?: number | null | undefined;
  /** Added once a token has occurred, -2 to 2; 0 is neutral. */
  presencePenalty?: number | null | undefined;
  /** Multiplies, above 0; 1 is neutral. */
  repetitionPenalty?: number | null | undefined;
  /** 64 bits: a bigint beyond 2 ** 53. */
  seed?: number | bigint | null | undefined;
  /** Answers to generate (`n` elsewhere). */
  choiceCount?: number | null | undefined;
  /** Return log probabilities, in `proto` of each choice. */
  logprobs?: boolean | null | undefined;
  /** Alternatives per token, 0 to 20; needs `logprobs`. */
  topLogprobs?: number | null | undefined;
  /** Token id to bias, -100 to 100. */
  logitBias?: Readonly<Record<number, number>> | null | undefined;
  /** "none", "minimal", "low", "medium", "high", ... */
  reasoningEffort?: string | null | undefined;
  /** Turn thinking on or off where the model allows it. */
  enableThinking?: boolean | null | undefined;
  /** "low", "medium", "high". */
  verbosity?: string | null | undefined;
  /** Allow several calls in one turn. */
  parallelToolCalls?: boolean | null | undefined;
  /** Tools the model may call. */
  tools?: readonly Tool[] | null | undefined;
  /** "auto", "none", "required", `{ name }` to force one, or the OpenAI layout. */
  toolChoice?:
    | "auto"
    | "none"
    | "required"
    | { readonly [field: string]: unknown }
    | ToolChoiceProto
    | null
    | undefined;
  /** "text", "json_object", or the OpenAI layout. */
  responseFormat?:
    | "text"
    | "json_object"
    | { readonly [field: string]: unknown }
    | ResponseFormat
    | null
    | undefined;
  /** JSON Schema the answer must match: `reply.json()` parses it. See {@link jsonSchema}. */
  jsonSchema?: AnswerSchema<T> | Json | null | undefined;
  /** Role rewriting for this call; replaces the configured templates of the model. */
  roleTemplates?: readonly (RoleTemplate | RoleTemplateProto)[] | null | undefined;
  /** Stable pseudonymous end-user identifier. */
  endUserId?: string | null | undefined;
  /** Cache bucket hint. */
  promptCacheKey?: string | null | undefined;
  /** "auto", "default", "flex", "priority", ... */
  serviceTier?: string | null | undefined;
  /** Whether a parameter the upstream does not take fails the call (the default). */
  unsupportedParameters?: "reject" | "drop" | null | undefined;
  /** For accounting. */
  labels?: Readonly<Record<string, string>> | null | undefined;
  /** Merged into the upstream's body last, for what is not modelled here. */
  extraBody?: Json | null | undefined;
}

/** What a stream takes. */
export interface StreamOptions<T = unknown> extends ChatOptions<T> {
  /** "cumulative" has the gateway send the whole text each time; default "delta". */
  mode?: "delta" | "cumulative" | undefined;
  /** Lets the gateway hold text back so long to send fewer, larger messages: 0 to 5000. */
  maxDelayMs?: number | undefined;
}

/** What a batch takes; the options hold for every item without its own. */
export interface BatchOptions extends ChatOptions {
  /** How many run at once; the gateway's default unless given. */
  maxConcurrency?: number | undefined;
}

/** One conversation of a batch with options of its own. */
export interface BatchItemObject extends Omit<ChatOptions, keyof CallOptions> {
  /** The conversation. */
  messages: Prompt;
  /** Your name for it, unique in the batch; repeated in the result. */
  customId?: string | undefined;
}

/** A prompt, or one with options of its own. */
export type BatchItem = Prompt | BatchItemObject | BatchChatItem;

const CALL_OPTIONS: ReadonlySet<string> = new Set(["timeoutMs", "signal", "requestId", "metadata"]);

// Names other libraries use, for the hint in the error.
const ELSEWHERE: Readonly<Record<string, string>> = {
  maxTokens: "maxCompletionTokens",
  maxNewTokens: "maxCompletionTokens",
  n: "choiceCount",
  user: "endUserId",
  safetyIdentifier: "endUserId",
  stopWords: "stop",
  functions: "tools",
  functionCall: "toolChoice",
  headers: "metadata",
  timeout: "timeoutMs",
  abortSignal: "signal",
};

// --- requests -------------------------------------------------------------------------

/**
 * A ChatRequest. Options of the call itself, such as `timeoutMs`, are left out.
 *
 * A ready request is copied, and what else is given replaces its fields. Throws TypeError and
 * RangeError that say where and what was expected.
 */
export function chatRequest(prompt: Prompt, options: ChatOptions = {}): ChatRequest {
  const given = optionsOf(options);
  const request = isMessage(prompt, ChatRequestSchema)
    ? clone(ChatRequestSchema, prompt)
    : create(ChatRequestSchema, { messages: messages(prompt, "messages") });
  if (given["model"] != null) request.model = text(given["model"], "model");
  if (request.model === "") {
    throw new TypeError('model: expected the name of a model, for example "gpt-4o-mini"');
  }
  if (given["jsonSchema"] != null && given["responseFormat"] != null) {
    throw new TypeError("jsonSchema, responseFormat: expected only one of them");
  }
  for (const [name, value] of Object.entries(given)) {
    if (name === "model" || CALL_OPTIONS.has(name)) continue;
    const set = SETTERS.get(name);
    if (set === undefined) throw new TypeError(unknownOption(name));
    if (value != null) set(request, name, value);
  }
  return request;
}

/** A StreamChatRequest; throws as `chatRequest` does. */
export function streamRequest(prompt: Prompt, options: StreamOptions): StreamChatRequest {
  const { mode = "delta", maxDelayMs = 0, ...rest } = optionsOf(options);
  const modes = { delta: StreamMode.DELTA, cumulative: StreamMode.CUMULATIVE };
  const request = create(StreamChatRequestSchema, {
    chat: chatRequest(prompt, rest),
    mode: oneOf(modes, mode, "mode"),
  });
  const delay = number(maxDelayMs, "maxDelayMs");
  if (!Number.isFinite(delay)) throw new RangeError(`maxDelayMs: ${delay} is no delay`);
  if (delay !== 0) request.maxDelay = durationOf(delay);
  return request;
}

/** Milliseconds as the contract has them. */
export function durationOf(ms: number): Duration {
  const nanos = Math.round(ms * 1e6);
  return create(DurationSchema, {
    seconds: BigInt(Math.trunc(nanos / 1e9)),
    nanos: nanos % 1e9,
  });
}

/**
 * A BatchChatRequest; throws as `chatRequest` does.
 *
 * The options hold for items without their own; a ready ChatRequest or BatchChatItem takes only
 * the model, and that only if it has none.
 */
export function batchRequest(items: Iterable<BatchItem>, options: BatchOptions): BatchChatRequest {
  const { maxConcurrency = 0, ...shared } = optionsOf(options);
  if (typeof items === "string" || typeof Object(items)[Symbol.iterator] !== "function") {
    throw new TypeError(`items: expected a list of prompts, ${got(items)}`);
  }
  const request = create(BatchChatRequestSchema, {
    maxConcurrency: int32(maxConcurrency, "maxConcurrency"),
  });
  for (const item of items) {
    request.items.push(within(`items[${request.items.length}]`, () => batchItem(item, shared)));
  }
  if (request.items.length === 0) throw new TypeError("items: expected at least one");
  return request;
}

function batchItem(item: unknown, shared: ChatOptions): BatchChatItem {
  if (isMessage(item, ChatRequestSchema)) item = create(BatchChatItemSchema, { chat: item });
  if (isMessage(item, BatchChatItemSchema)) {
    // Ready: it lacks at most the model.
    const { customId, chat = create(ChatRequestSchema) } = item;
    const model = chat.model ? {} : { model: shared.model };
    return create(BatchChatItemSchema, { customId, chat: chatRequest(chat, model) });
  }
  if (!isPlain(item)) {
    return create(BatchChatItemSchema, { chat: chatRequest(item as Prompt, shared) });
  }
  const { messages: prompt, customId, ...own } = item;
  if (prompt === undefined) {
    throw new TypeError(`expected "messages", got the keys ${Object.keys(item).join(", ")}`);
  }
  const misplaced = Object.keys(own).find((name) => CALL_OPTIONS.has(name));
  if (misplaced !== undefined) {
    throw new TypeError(
      `${misplaced}: one call carries the whole batch: give it to batch() itself`,
    );
  }
  if (own["model"] == null) delete own["model"];
  return create(BatchChatItemSchema, {
    customId: customId == null ? "" : text(customId, "customId"),
    chat: chatRequest(prompt as Prompt, { ...shared, ...own }),
  });
}

/** A CountTokensRequest: of one text as it is, or of a conversation with its layout. */
export function countRequest(prompt: Prompt, options: ChatOptions): CountTokensRequest {
  const chat = chatRequest(prompt, options);
  const plain = Object.entries(options).every(
    ([name, value]) => name === "model" || CALL_OPTIONS.has(name) || value == null,
  );
  return create(CountTokensRequestSchema, {
    model: chat.model,
    input:
      typeof prompt === "string" && plain
        ? { case: "text", value: prompt }
        : { case: "chat", value: chat },
  });
}

/** A TokenizeRequest; throws as `chatRequest` does. */
export function tokenizeRequest(
  texts: string | readonly string[],
  options: CallOptions & { model: string },
): TokenizeRequest {
  const { model, ...rest } = optionsOf(options);
  onlyCallOptions(rest);
  const each = typeof texts === "string" ? [texts] : list(texts, "texts", "strings");
  return create(TokenizeRequestSchema, {
    model: text(model, "model"),
    texts: each.map((one, i) => text(one, `texts[${i}]`)),
  });
}

/** Throws TypeError for an option that is not of every call. */
export function onlyCallOptions(options: object): void {
  for (const name of Object.keys(options)) {
    if (!CALL_OPTIONS.has(name)) {
      throw new TypeError(`unknown option "${name}", expected ${[...CALL_OPTIONS].join(", ")}`);
    }
  }
}

function optionsOf(options: object): Record<string, unknown> {
  if (!isPlain(options)) throw new TypeError(`options: expected an object, ${got(options)}`);
  return options;
}

// --- options --------------------------------------------------------------------------

type Setter = (request: ChatRequest, name: string, value: unknown) => void;
type Params<V> = {
  [K in keyof GenerationParams]-?: V extends GenerationParams[K] ? K : never;
}[keyof GenerationParams];

function params(request: ChatRequest): GenerationParams {
  request.params ??= create(GenerationParamsSchema);
  return request.params;
}

function param<V extends number | boolean | string>(
  field: Params<V>,
  read: (value: unknown, where: string) => V,
): Setter {
  return (request, name, value) => {
    Object.assign(params(request), { [field]: read(value, name) });
  };
}

const SETTERS: ReadonlyMap<string, Setter> = new Map<string, Setter>([
  ["temperature", param("temperature", number)],
  ["topP", param("topP", number)],
  ["topK", param("topK", int32)],
  ["minP", param("minP", number)],
  ["maxCompletionTokens", param("maxCompletionTokens", int32)],
  ["frequencyPenalty", param("frequencyPenalty", number)],
  ["presencePenalty", param("presencePenalty", number)],
  ["repetitionPenalty", param("repetitionPenalty", number)],
  ["choiceCount", param("choiceCount", int32)],
  ["logprobs", param("logprobs", flag)],
  ["topLogprobs", param("topLogprobs", int32)],
  ["reasoningEffort", param("reasoningEffort", text)],
  ["enableThinking", param("enableThinking", flag)],
  ["verbosity", param("verbosity", text)],
  ["parallelToolCalls", param("parallelToolCalls", flag)],
  [
    "seed",
    (request, name, value) => {
      params(request).seed = int64(value, name);
    },
  ],
  [
    "stop",
    (request, name, value) => {
      const each = typeof value === "string" ? [value] : list(value, name, "strings");
      params(request).stop = each.map((one, i) => text(one, `${name}[${i}]`));
    },
  ],
  [
    "logitBias",
    (request, name, value) => {
      const biases: Record<number, number> = {};
      for (const [token, bias] of Object.entries(object(value, name))) {
        if (!/^\d+$/.test(token)) throw new TypeError(`${name}: "${token}" is no token id`);
        biases[int32(Number(token), `${name} key`)] = number(bias, `${name}[${token}]`);
      }
      params(request).logitBias = biases;
    },
  ],
  [
    "tools",
    (request, name, value) => {
      request.tools = list(value, name, "tools").map((one, i) => tool(one, `${name}[${i}]`));
    },
  ],
  [
    "toolChoice",
    (request, name, value) => {
      request.toolChoice = toolChoice(value, name);
    },
  ],
  [
    "responseFormat",
    (request, name, value) => {
      request.responseFormat = responseFormat(value, name);
    },
  ],
  [
    "jsonSchema",
    (request, name, value) => {
      request.responseFormat = create(ResponseFormatSchema, {
        format: { case: "jsonSchema", value: answerSchema(value, name) },
      });
    },
  ],
  [
    "roleTemplates",
    (request, name, value) => {
      request.roleTemplates = list(value, name, "role templates").map((one, i) =>
        roleTemplate(one, `${name}[${i}]`),
      );
    },
  ],
  [
    "endUserId",
    (request, name, value) => {
      request.endUserId = text(value, name);
    },
  ],
  [
    "promptCacheKey",
    (request, name, value) => {
      request.promptCacheKey = text(value, name);
    },
  ],
  [
    "serviceTier",
    (request, name, value) => {
      request.serviceTier = text(value, name);
    },
  ],
  [
    "unsupportedParameters",
    (request, name, value) => {
      const policies = {
        reject: UnsupportedParameterPolicy.REJECT,
        drop: UnsupportedParameterPolicy.DROP,
      };
      request.unsupportedParameterPolicy = oneOf(policies, value, name);
    },
  ],
  [
    "labels",
    (request, name, value) => {
      request.labels = Object.fromEntries(
        Object.entries(object(value, name)).map(([key, label]) => [
          text(key, `${name} key`),
          text(label, `${name}["${key}"]`),
        ]),
      );
    },
  ],
  [
    "extraBody",
    (request, name, value) => {
      request.extraBodyJson = json(value, name);
    },
  ],
]);

function unknownOption(name: string): string {
  const flat = (word: string) => word.replaceAll("_", "").toLowerCase();
  const known = [...SETTERS.keys(), ...CALL_OPTIONS, ...Object.keys(ELSEWHERE)];
  const near = known.find((word) => flat(word) === flat(name));
  const hint = near === undefined ? undefined : (ELSEWHERE[near] ?? near);
  return `unknown option "${name}"${hint === undefined ? "" : `; did you mean "${hint}"?`}`;
}

// --- messages -------------------------------------------------------------------------

function messages(prompt: unknown, where: string): ChatMessage[] {
  if (typeof prompt === "string") {
    return [create(ChatMessageSchema, { role: "user", content: text(prompt, where) })];
  }
  if (!Array.isArray(prompt)) {
    throw new TypeError(
      `${where}: expected a string, a list of messages or a ChatRequest, ${got(prompt)}`,
    );
  }
  if (prompt.length === 0) throw new TypeError(`${where}: expected at least one message`);
  return prompt.map((each, i) => message(each, `${where}[${i}]`));
}

function message(value: unknown, where: string): ChatMessage {
  if (isMessage(value, ChatMessageSchema)) return value;
  if (value instanceof Answer || value instanceof Choice) return value.message;
  if (!isPlain(value)) {
    throw new TypeError(
      `${where}: expected an object such as { role: "user", content: "..." }, a ChatMessage or ` +
        `an earlier answer, ${got(value)}`,
    );
  }
  const fields = new Fields(value, where);
  const role = fields.text("role") ?? "";
  if (role === "") throw new TypeError(`${where}.role: expected a role such as "user"`);
  const result = create(ChatMessageSchema, { role });
  const content = fields.take("content");
  if (typeof content === "string") {
    result.content = text(content, `${where}.content`);
  } else if (content !== undefined) {
    result.parts = list(content, `${where}.content`, "parts").map((one, i) =>
      part(one, `${where}.content[${i}]`),
    );
  } else if (role !== "assistant" || fields.isEmpty) {
    throw new TypeError(`${where}.content: missing`);
  }
  result.toolCalls = fields
    .list("toolCalls", "tool_calls")
    .map((one, i) => toolCall(one, `${where}.toolCalls[${i}]`));
  result.annotations = fields
    .list("annotations")
    .map((one, i) => annotation(one, `${where}.annotations[${i}]`));
  result.name = fields.text("name") ?? "";
  result.toolCallId = fields.text("toolCallId", "tool_call_id") ?? "";
  const reasoning = fields.text("reasoning", "reasoning_content", "reasoningContent");
  if (reasoning !== undefined) result.reasoning = reasoning;
  const refusal = fields.text("refusal");
  if (refusal !== undefined) result.refusal = refusal;
  result.extraJson = fields.rest();
  return result;
}

function part(value: unknown, where: string): ContentPartProto {
  if (isMessage(value, ContentPartSchema)) return value;
  if (typeof value === "string") {
    return create(ContentPartSchema, { part: { case: "text", value: text(value, where) } });
  }
  const raw = object(value, where);
  const fields = new Fields(raw, where);
  const kind = fields.text("type") ?? ("text" in raw ? "text" : undefined);
  let made: ContentPartProto["part"];
  switch (kind) {
    case undefined:
      throw new TypeError(`${where}.type: missing, expected for example "text" or "image_url"`);
    case "text":
      made = { case: "text", value: text(fields.take("text"), `${where}.text`) };
      break;
    case "image":
    case "audio":
    case "video":
      made = { case: kind, value: media(fields, where) };
      break;
    case "image_url":
    case "video_url": {
      const source = fields.take(kind);
      const inner =
        typeof source === "string" ? { url: source } : object(source, `${where}.${kind}`);
      const value = media(new Fields(inner, `${where}.${kind}`), `${where}.${kind}`);
      made = { case: kind === "image_url" ? "image" : "video", value };
      break;
    }
    case "input_audio": {
      const at = `${where}.${kind}`;
      const audio = object(fields.take(kind), at);
      only(audio, ["data", "format"], at);
      const value = create(MediaSchema, {
        source: { case: "data", value: base64(audio["data"], `${at}.data`) },
        mediaType: `audio/${text(audio["format"], `${at}.format`)}`,
      });
      made = { case: "audio", value };
      break;
    }
    case "file": {
      const inner = fields.take("file");
      const at = inner === undefined ? where : `${where}.file`;
      const source = inner === undefined ? fields : new Fields(object(inner, at), at);
      made = { case: "file", value: media(source, at) };
      break;
    }
    default:
      return create(ContentPartSchema, { part: { case: "rawJson", value: json(raw, where) } });
  }
  return create(ContentPartSchema, { part: made, extraJson: fields.rest() });
}

function media(fields: Fields, where: string): Media {
  const sources: Media["source"][] = [];
  const data = fields.take("data");
  if (data !== undefined) {
    if (!(data instanceof Uint8Array)) {
      throw new TypeError(`${where}.data: expected a Uint8Array, ${got(data)}`);
    }
    sources.push({ case: "data", value: data });
  }
  const url = fields.text("url", "file_data"); // file_data: a data: URL
  if (url !== undefined) sources.push({ case: "url", value: url });
  const fileId = fields.text("fileId", "file_id");
  if (fileId !== undefined) sources.push({ case: "fileId", value: fileId });
  const [source] = sources;
  if (source === undefined || sources.length > 1) {
    throw new TypeError(`${where}: expected one of "data", "url" and "fileId"`);
  }
  const result = create(MediaSchema, {
    source,
    mediaType: fields.text("mediaType", "media_type") ?? "",
    filename: fields.text("filename") ?? "",
    detail: fields.text("detail") ?? "",
  });
  fields.none();
  if (source.case === "data" && !result.mediaType) {
    throw new TypeError(`${where}.mediaType: missing, expected for example "image/png"`);
  }
  return result;
}

function toolCall(value: unknown, where: string): ToolCallProto {
  if (isMessage(value, ToolCallSchema)) return value;
  if (value instanceof ToolCall) return value.proto;
  const fields = object(value, where);
  const id = text(fields["id"] ?? "", `${where}.id`);
  if (fields["custom"] != null) {
    const custom = object(fields["custom"], `${where}.custom`);
    const name = text(custom["name"], `${where}.custom.name`);
    const input = text(custom["input"], `${where}.custom.input`);
    return create(ToolCallSchema, { id, call: { case: "custom", value: { name, input } } });
  }
  const called = object(fields["function"], `${where}.function`);
  const name = text(called["name"], `${where}.function.name`);
  const argumentsJson = json(called["arguments"] ?? "", `${where}.function.arguments`);
  return create(ToolCallSchema, { id, call: { case: "function", value: { name, argumentsJson } } });
}

function annotation(value: unknown, where: string): Annotation {
  if (isMessage(value, AnnotationSchema)) return value;
  const raw = object(value, where);
  const cited = new Fields(object(raw["url_citation"] ?? raw, where), where);
  return create(AnnotationSchema, {
    url: cited.text("url") ?? "",
    title: cited.text("title") ?? "",
    startOffset: int32(cited.take("startOffset", "start_index") ?? 0, `${where}.startOffset`),
    endOffset: int32(cited.take("endOffset", "end_index") ?? 0, `${where}.endOffset`),
  });
}

// --- tools and formats ----------------------------------------------------------------

function tool(value: unknown, where: string): ToolProto {
  if (isMessage(value, ToolSchema)) return value;
  if (isMessage(value, FunctionToolSchema)) {
    return create(ToolSchema, { tool: { case: "function", value } });
  }
  const raw = object(value, where);
  const kind = raw["type"] ?? "function";
  if (kind === "custom") {
    const at = `${where}.custom`;
    const custom = object(raw["custom"], at);
    only(custom, ["name", "description", "format"], at);
    const made = {
      name: text(custom["name"], `${at}.name`),
      description: text(custom["description"] ?? "", `${at}.description`),
      formatJson: custom["format"] == null ? "" : json(custom["format"], `${at}.format`),
    };
    return create(ToolSchema, { tool: { case: "custom", value: made } });
  }
  if (kind !== "function") {
    return create(ToolSchema, { tool: { case: "rawJson", value: json(raw, where) } });
  }
  const at = raw["function"] == null ? where : `${where}.function`;
  const given = raw["function"] == null ? raw : object(raw["function"], at);
  only(given, ["type", "name", "description", "parameters", "strict"], at);
  const declared = create(FunctionToolSchema, {
    name: text(given["name"], `${at}.name`),
    description: text(given["description"] ?? "", `${at}.description`),
    parametersSchemaJson:
      given["parameters"] == null ? "" : json(given["parameters"], `${at}.parameters`),
  });
  if (given["strict"] != null) declared.strict = flag(given["strict"], `${at}.strict`);
  return create(ToolSchema, { tool: { case: "function", value: declared } });
}

function toolChoice(value: unknown, where: string): ToolChoiceProto {
  const modes = {
    auto: ToolChoice_Mode.AUTO,
    none: ToolChoice_Mode.NONE,
    required: ToolChoice_Mode.REQUIRED,
  };
  if (isMessage(value, ToolChoiceSchema)) return value;
  if (typeof value === "string") {
    return create(ToolChoiceSchema, { mode: oneOf(modes, value, where) });
  }
  const fields = object(value, where);
  if (fields["allowed_tools"] != null) {
    const at = `${where}.allowed_tools`;
    const allowed = object(fields["allowed_tools"], at);
    return create(ToolChoiceSchema, {
      mode: oneOf(modes, allowed["mode"] ?? "auto", `${at}.mode`),
      toolNames: list(allowed["tools"], `${at}.tools`, "tools").map((one) =>
        named(one, `${at}.tools`),
      ),
    });
  }
  return create(ToolChoiceSchema, {
    mode: ToolChoice_Mode.REQUIRED,
    toolNames: [named(fields, where)],
  });
}

function named(value: unknown, where: string): string {
  const fields = object(value, where);
  const inner = fields["function"] ?? fields["custom"];
  return text(isPlain(inner) ? inner["name"] : fields["name"], `${where}.name`);
}

function responseFormat(value: unknown, where: string): ResponseFormat {
  if (isMessage(value, ResponseFormatSchema)) return value;
  const fields = typeof value === "string" ? { type: value } : object(value, where);
  switch (fields["type"]) {
    case "text":
      return create(ResponseFormatSchema, { format: { case: "text", value: {} } });
    case "json_object":
      return create(ResponseFormatSchema, { format: { case: "jsonObject", value: {} } });
    case "json_schema": {
      const at = `${where}.json_schema`;
      const given = wrapped(object(fields["json_schema"], at), at);
      return create(ResponseFormatSchema, { format: { case: "jsonSchema", value: given } });
    }
  }
  if (typeof value === "string") {
    throw new TypeError(`${where}: expected "text", "json_object" or an object, ${got(value)}`);
  }
  return create(ResponseFormatSchema, { format: { case: "rawJson", value: json(fields, where) } });
}

function answerSchema(value: unknown, where: string): JsonSchemaFormat {
  const typed = value instanceof AnswerSchema;
  if (!typed && isPlain(value) && "schema" in value) return wrapped(value, where);
  const { schema, options }: { schema: unknown; options: JsonSchemaOptions } = typed
    ? value
    : { schema: value, options: {} };
  // Upstreams want a name of this alphabet, and few people have one at hand.
  const title = isPlain(schema) ? String(schema["title"] ?? "") : "";
  const name = title.replace(/[^A-Za-z0-9_-]/gu, "_").slice(0, 64) || "answer";
  return wrapped({ name, ...options, schema }, where);
}

function wrapped(fields: Record<string, unknown>, where: string): JsonSchemaFormat {
  only(fields, ["name", "schema", "description", "strict"], where);
  const made = create(JsonSchemaFormatSchema, {
    name: text(fields["name"], `${where}.name`),
    schemaJson: json(fields["schema"], `${where}.schema`),
    description: text(fields["description"] ?? "", `${where}.description`),
  });
  if (fields["strict"] != null) made.strict = flag(fields["strict"], `${where}.strict`);
  return made;
}

function roleTemplate(value: unknown, where: string): RoleTemplateProto {
  if (isMessage(value, RoleTemplateSchema)) return value;
  const fields = new Fields(object(value, where), where);
  const made = create(RoleTemplateSchema, {
    role: text(fields.take("role"), `${where}.role`),
    apiRole: fields.text("apiRole", "api_role") ?? "",
    begin: fields.text("begin") ?? "",
    end: fields.text("end") ?? "",
    fallbackRole: fields.text("fallbackRole", "fallback_role") ?? "",
  });
  fields.none();
  return made;
}

// --- values ---------------------------------------------------------------------------

/** Fields of an object that are taken out one by one, so that what is left is what is unknown. */
class Fields {
  readonly #left: Map<string, unknown>;
  readonly #where: string;

  constructor(fields: Record<string, unknown>, where: string) {
    this.#left = new Map(Object.entries(fields).filter(([, value]) => value != null));
    this.#where = where;
  }

  get isEmpty(): boolean {
    return this.#left.size === 0;
  }

  /** The value under the first of the names that is there; the others are taken, too. */
  take(...names: string[]): unknown {
    let value: unknown;
    for (const name of names) {
      value ??= this.#left.get(name);
      this.#left.delete(name);
    }
    return value;
  }

  text(...names: [string, ...string[]]): string | undefined {
    const value = this.take(...names);
    return value === undefined ? undefined : text(value, `${this.#where}.${names[0]}`);
  }

  list(...names: [string, ...string[]]): readonly unknown[] {
    const value = this.take(...names);
    return value === undefined ? [] : list(value, `${this.#where}.${names[0]}`, "");
  }

  /** What was not taken, as JSON text; "" when that is nothing. */
  rest(): string {
    return this.isEmpty ? "" : json(Object.fromEntries(this.#left), this.#where);
  }

  /** Throws when something was not taken. */
  none(): void {
    const [unknown] = this.#left.keys();
    if (unknown !== undefined) throw new TypeError(`${this.#where}: unknown key "${unknown}"`);
  }
}

function text(value: unknown, where: string): string {
  if (typeof value !== "string") throw new TypeError(`${where}: expected a string, ${got(value)}`);
  if (!value.isWellFormed()) {
    throw new TypeError(`${where}: holds half of a surrogate pair, which is no Unicode text`);
  }
  return value;
}

function number(value: unknown, where: string): number {
  if (typeof value !== "number") throw new TypeError(`${where}: expected a number, ${got(value)}`);
  return value;
}

function int32(value: unknown, where: string): number {
  if (!Number.isInteger(number(value, where))) {
    throw new TypeError(`${where}: expected an integer, ${got(value)}`);
  }
  if ((value as number) !== ((value as number) | 0)) {
    throw new RangeError(`${where}: ${value} does not fit in 32 bits`);
  }
  return value as number;
}

function int64(value: unknown, where: string): bigint {
  if (typeof value === "number" && !Number.isSafeInteger(value)) {
    throw new TypeError(`${where}: expected an integer, or a bigint beyond 2 ** 53, ${got(value)}`);
  }
  const wide = typeof value === "bigint" ? value : BigInt(number(value, where));
  if (BigInt.asIntN(64, wide) !== wide) {
    throw new RangeError(`${where}: ${wide} does not fit in 64 bits`);
  }
  return wide;
}

function flag(value: unknown, where: string): boolean {
  if (typeof value !== "boolean") {
    throw new TypeError(`${where}: expected true or false, ${got(value)}`);
  }
  return value;
}

function json(value: unknown, where: string): string {
  if (typeof value === "string") return text(value, where);
  const fields = object(value, where, "an object or JSON text");
  try {
    return text(JSON.stringify(fields), where);
  } catch (error) {
    throw new TypeError(`${where}: ${(error as Error).message}`);
  }
}

function base64(value: unknown, where: string): Uint8Array {
  const given = text(value, where);
  if (given.length % 4 !== 0 || !/^[A-Za-z0-9+/]*={0,2}$/.test(given)) {
    throw new TypeError(`${where}: expected base64`);
  }
  return new Uint8Array(Buffer.from(given, "base64"));
}

function list(value: unknown, where: string, of: string): readonly unknown[] {
  if (!Array.isArray(value)) {
    throw new TypeError(`${where}: expected a list${of && ` of ${of}`}, ${got(value)}`);
  }
  return value;
}

function object(value: unknown, where: string, expected = "an object"): Record<string, unknown> {
  if (!isPlain(value)) throw new TypeError(`${where}: expected ${expected}, ${got(value)}`);
  return value;
}

/** Whether this is an object of fields, rather than a list, bytes or an object of some class. */
function isPlain(value: unknown): value is Record<string, unknown> {
  if (Object.prototype.toString.call(value) !== "[object Object]") return false;
  return !(isMessage(value) || value instanceof Answer || value instanceof Choice);
}

function only(fields: Record<string, unknown>, known: readonly string[], where: string): void {
  const unknown = Object.keys(fields).find((name) => !known.includes(name));
  if (unknown !== undefined) {
    throw new TypeError(`${where}: unknown key "${unknown}", expected ${known.join(", ")}`);
  }
}

function oneOf<V>(choices: Readonly<Record<string, V>>, value: unknown, where: string): V {
  if (typeof value === "string" && Object.hasOwn(choices, value)) return choices[value] as V;
  const expected = Object.keys(choices).map((name) => `"${name}"`);
  throw new TypeError(`${where}: expected ${expected.join(" or ")}, ${got(value)}`);
}

function within<T>(where: string, build: () => T): T {
  try {
    return build();
  } catch (error) {
    if (error instanceof RangeError) throw new RangeError(`${where}: ${error.message}`);
    if (error instanceof TypeError) throw new TypeError(`${where}: ${error.message}`);
    throw error;
  }
}

function got(value: unknown): string {
  if (value === null || value === undefined) return `got ${value}`;
  if (typeof value === "string" && value.length <= 40) return `got ${JSON.stringify(value)}`;
  if (typeof value === "number" || typeof value === "bigint") return `got ${value}`;
  if (Array.isArray(value)) return "got a list";
  if (isMessage(value)) return `got a ${value.$typeName}`;
  return `got ${typeof value === "object" ? value.constructor?.name : typeof value}`;
}
