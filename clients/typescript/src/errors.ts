/** The one error of the client: what a failed call said, decoded. */

import type { Message } from "@bufbuild/protobuf";
import { create, fromBinary } from "@bufbuild/protobuf";
import type { GenMessage } from "@bufbuild/protobuf/codegenv2";
import { anyUnpack } from "@bufbuild/protobuf/wkt";
import { status as grpcStatus, type Metadata } from "@grpc/grpc-js";
import {
  BadRequestSchema,
  ErrorInfoSchema,
  RetryInfoSchema,
} from "./gen/google/rpc/error_details_pb.js";
import { type Status, StatusSchema } from "./gen/google/rpc/status_pb.js";
import type { Reply } from "./replies.js";

/** Trailer: the google.rpc.Status with its details. */
export const DETAILS_KEY = "grpc-status-details-bin";
/** Trailer: when to try again, -1 for never. */
export const PUSHBACK_KEY = "grpc-retry-pushback-ms";
/** Metadata and trailer: the name of a call in the gateway's log. */
export const REQUEST_ID_KEY = "x-request-id";

/** The only reason this package makes itself: the server said OK, yet did not finish. */
export const INCOMPLETE = "STREAM_INCOMPLETE";
const INTERRUPTED = "UPSTREAM_STREAM_INTERRUPTED";

/** A gRPC status code by its name. */
export type StatusCode = Exclude<keyof typeof grpcStatus, "OK">;

/** One field the server did not accept. */
export interface FieldViolation {
  /** Path in the request, for example `messages[0].role`. */
  readonly field: string;
  /** What was there and what was expected. */
  readonly description: string;
}

/** What a {@link TokenwireError} is made of. */
export interface TokenwireErrorInit {
  /** See {@link TokenwireError.code}; the others likewise. */
  code: StatusCode;
  /** "" unless given. */
  reason?: string;
  /** Unknown unless given. */
  retryAfterMs?: number | undefined;
  /** "" unless given. */
  requestId?: string;
  /** None unless given. */
  fieldViolations?: readonly FieldViolation[];
  /** Empty unless given. */
  metadata?: Readonly<Record<string, string>>;
  /** Nothing unless given. */
  partial?: Reply | undefined;
  /** Made of the code and the message unless given. */
  proto?: Status | undefined;
  /** What led to it, as of any Error. */
  cause?: unknown;
}

/**
 * A call that failed.
 *
 * `message` tells the reason, the server's words and whatever helps to act; `rawMessage` is the
 * server's words alone.
 */
export class TokenwireError extends Error {
  override readonly name = "TokenwireError";
  /** One line for people, as the server wrote it. */
  readonly rawMessage: string;
  /** The gRPC status code, for example "UNAVAILABLE". */
  readonly code: StatusCode;
  /**
   * A name from `ErrorReason` without its prefix, for example "RATE_LIMITED"; "" when the status
   * did not come from a Tokenwire gateway (no connection, a proxy, a deadline that passed here);
   * "STREAM_INCOMPLETE" when the server ended with OK before the answer was whole;
   * "UPSTREAM_STREAM_INTERRUPTED" also of a stream whose connection broke amid its answer.
   */
  readonly reason: string;
  /** Milliseconds to wait before another try; undefined when nobody said. */
  readonly retryAfterMs: number | undefined;
  /** The call's `x-request-id`, to quote to whoever runs the gateway. */
  readonly requestId: string;
  /** The fields that were not accepted. */
  readonly fieldViolations: readonly FieldViolation[];
  /** The ErrorInfo metadata: `upstream`, `upstreamStatus`, `attempts`, ... */
  readonly metadata: Readonly<Record<string, string>>;
  /** Of a stream: what had arrived before it failed. */
  readonly partial: Reply | undefined;
  /** The google.rpc.Status with every detail as it was sent. */
  readonly proto: Status;

  constructor(rawMessage: string, init: TokenwireErrorInit) {
    super(told(rawMessage, init), init.cause === undefined ? undefined : { cause: init.cause });
    this.rawMessage = rawMessage;
    this.code = init.code;
    this.reason = init.reason ?? "";
    this.retryAfterMs = init.retryAfterMs;
    this.requestId = init.requestId ?? "";
    this.fieldViolations = Object.freeze([...(init.fieldViolations ?? [])]);
    this.metadata = Object.freeze({ ...init.metadata });
    this.partial = init.partial;
    this.proto =
      init.proto ?? create(StatusSchema, { code: grpcStatus[init.code], message: rawMessage });
    // Loggers print every enumerable property of an error: these repeat the rest, at length.
    for (const name of ["name", "partial", "proto"]) {
      Object.defineProperty(this, name, { enumerable: false });
    }
  }

  /** Upstream requests the gateway made for this call; 0 when it did not say. */
  get attempts(): number {
    return attemptsOf(this.metadata);
  }

  /** Text of the first choice that had arrived; "" when none had. */
  get partialText(): string {
    return this.partial?.text ?? "";
  }

  /**
   * Whether the same call may succeed later, after `retryAfterMs` if that is set.
   *
   * The channel and the gateway have made their own retries by then. Repeating a stream repeats,
   * and bills, the part that had arrived.
   */
  get isRetryable(): boolean {
    // Without a time to wait for, what is exhausted does not refill by itself: credit, or a
    // request larger than the limit.
    if (this.code === "RESOURCE_EXHAUSTED") return this.retryAfterMs !== undefined;
    return this.code === "UNAVAILABLE";
  }
}

/**
 * Puts in the error of a stream what had arrived before it. Where a connection broke amid the
 * answer, nobody was left to give a reason: it is the one that the gateway would give.
 */
export function attachPartial(error: TokenwireError, partial: Reply): TokenwireError {
  Object.defineProperty(error, "partial", { value: partial });
  if (error.code === "UNAVAILABLE" && error.reason === "" && partial.choices.length > 0) {
    Object.defineProperty(error, "reason", { value: INTERRUPTED, enumerable: true });
  }
  return error;
}

function told(rawMessage: string, init: TokenwireErrorInit): string {
  const facts: string[] = [];
  if (init.retryAfterMs !== undefined) facts.push(`retry after ${init.retryAfterMs / 1000} s`);
  const attempts = attemptsOf(init.metadata ?? {});
  if (attempts > 1) facts.push(`${attempts} attempts`);
  if (init.requestId) facts.push(`request ${init.requestId}`);
  let text = `${init.reason || init.code}: ${rawMessage}`;
  if (facts.length > 0) text += ` (${facts.join(", ")})`;
  for (const { field, description } of init.fieldViolations ?? []) {
    const line = `${field}: ${description}`;
    // A message made of its only violation does not need it again.
    if (!rawMessage.includes(line)) text += `\n  ${line}`;
  }
  return text;
}

function attemptsOf(metadata: Readonly<Record<string, string>>): number {
  const text = metadata["attempts"] ?? "";
  return /^\d{1,9}$/.test(text) ? Number(text) : 0;
}

/** The error a finished RPC stands for. */
export function fromCall(
  code: number,
  message: string,
  trailers: Metadata,
  more: { requestId: string; partial?: Reply | undefined; cause?: unknown },
): TokenwireError {
  let status = create(StatusSchema);
  const [details] = trailers.get(DETAILS_KEY);
  if (details instanceof Uint8Array) {
    try {
      status = fromBinary(StatusSchema, new Uint8Array(details));
    } catch {
      // Somebody else's details: the code and the message still hold.
    }
  }
  status.code = code;
  status.message = message;
  const [echoed] = trailers.get(REQUEST_ID_KEY);
  const [pushback] = trailers.get(PUSHBACK_KEY);
  return fromStatus(status, {
    ...more,
    requestId: typeof echoed === "string" && echoed ? echoed : more.requestId,
    pushbackMs: /^\d{1,12}$/.test(String(pushback)) ? Number(pushback) : 0,
  });
}

/** The error a google.rpc.Status stands for. */
export function fromStatus(
  status: Status,
  more: { requestId: string; partial?: Reply | undefined; cause?: unknown; pushbackMs?: number },
): TokenwireError {
  const info = detail(status, ErrorInfoSchema);
  const delay = detail(status, RetryInfoSchema)?.retryDelay;
  const refused = detail(status, BadRequestSchema);
  const ours = info?.domain === "tokenwire" ? info : undefined;
  let retryAfterMs = delay && Number(delay.seconds) * 1000 + delay.nanos / 1e6;
  if (retryAfterMs === undefined && more.pushbackMs) retryAfterMs = more.pushbackMs;
  return new TokenwireError(status.message || "no message", {
    code: codeName(status.code),
    reason: ours?.reason ?? "",
    retryAfterMs,
    requestId: ours?.metadata["requestId"] || more.requestId,
    fieldViolations: (refused?.fieldViolations ?? []).map(({ field, description }) => ({
      field,
      description,
    })),
    metadata: ours?.metadata ?? {},
    partial: more.partial,
    proto: status,
    cause: more.cause,
  });
}

function codeName(code: number): StatusCode {
  const name = code === grpcStatus.OK ? undefined : grpcStatus[code];
  return name === undefined ? "UNKNOWN" : (name as StatusCode);
}

function detail<M extends Message>(status: Status, schema: GenMessage<M>): M | undefined {
  for (const packed of status.details) {
    try {
      const message = anyUnpack(packed, schema);
      if (message !== undefined) return message;
    } catch {
      // A damaged detail is no reason to hide the error it came with.
    }
  }
  return undefined;
}
