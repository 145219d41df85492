/** The contract's own messages, for where the client's options do not reach: `tokenwire/v1`. */

export { create, fromBinary, fromJson, isMessage, toBinary, toJson } from "@bufbuild/protobuf";
export * from "./gen/tokenwire/v1/chat_pb.js";
export * from "./gen/tokenwire/v1/chat_service_pb.js";
export * from "./gen/tokenwire/v1/error_reason_pb.js";
export * from "./gen/tokenwire/v1/model_service_pb.js";
export * from "./gen/tokenwire/v1/tokenizer_service_pb.js";
