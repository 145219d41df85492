/** Client of Tokenwire, the gRPC gateway for LLM chat. */

export type { ConnectOptions, Tls, TlsOptions, Token } from "./channel.js";
export {
  type BatchResult,
  BatchStream,
  ChatStream,
  type Model,
  type TokenCount,
  type TokenList,
  Tokenwire,
  type TokenwireOptions,
} from "./client.js";
export {
  type FieldViolation,
  type StatusCode,
  TokenwireError,
  type TokenwireErrorInit,
} from "./errors.js";
export {
  Accumulator,
  Answer,
  Choice,
  type FinishReason,
  type Header,
  type Parser,
  Reply,
  StreamEvent,
  ToolCall,
  type UpstreamAttempt,
  type Usage,
} from "./replies.js";
export {
  AnswerSchema,
  type BatchItem,
  type BatchItemObject,
  type BatchOptions,
  type CallOptions,
  type ChatOptions,
  type ContentPart,
  type Json,
  type JsonSchemaOptions,
  jsonSchema,
  type MediaPart,
  type Message,
  type MessageObject,
  type Prompt,
  type RoleTemplate,
  type StreamOptions,
  type Tool,
  type ToolDefinition,
} from "./requests.js";
export { VERSION } from "./version.js";
