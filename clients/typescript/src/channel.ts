/** How a client reaches its gateway: address, credentials, channel options, retries. */

import * as grpc from "@grpc/grpc-js";
import { VERSION } from "./version.js";

/** Where a gateway listens unless told otherwise. */
export const DEFAULT_TARGET = "localhost:50051";

/** Largest message in either direction: room for inline images. The gateway has the same. */
export const MAX_MESSAGE_BYTES = 32 * 1024 * 1024;

/** A bearer token, or what returns the current one; asked once per call. */
export type Token = string | (() => string | Promise<string>);

/** PEM texts, named as in `node:tls`. */
export interface TlsOptions {
  /** Authorities to trust instead of those that Node.js has. */
  ca?: string | Uint8Array;
  /** The client's own certificate chain, for mutual TLS; with `key`. */
  cert?: string | Uint8Array;
  /** The private key of `cert`. */
  key?: string | Uint8Array;
}

/** True: the authorities that Node.js has. False: plaintext. Credentials of grpc-js pass through. */
export type Tls = boolean | TlsOptions | grpc.ChannelCredentials;

/** How to connect; see {@link Tokenwire}. */
export interface ConnectOptions {
  /**
   * HOST:PORT or any gRPC target; default `TOKENWIRE_TARGET` from the environment, else
   * localhost:50051.
   */
  target?: string | undefined;
  /** Bearer token; default `TOKENWIRE_TOKEN` from the environment; "" for none. */
  token?: Token | undefined;
  /** Default: plaintext. */
  tls?: Tls | undefined;
  /** Options of the grpc-js channel; each replaces the built-in one of its name. */
  channelOptions?: grpc.ChannelOptions | undefined;
}

// Chats are retried only when the gateway (or no gateway) answered UNAVAILABLE before the first
// byte of an answer: gRPC commits a call once its headers arrive. The gateway sends
// `grpc-retry-pushback-ms: -1` when it has used up its own retries, which ends these too. No
// other code is retried: it would repeat what is billed, or what cannot succeed.
const RETRIED: Readonly<Record<string, readonly string[]>> = {
  "tokenwire.v1.ChatService": ["Chat", "StreamChat", "BatchChat"],
  "tokenwire.v1.TokenizerService": ["CountTokens", "Tokenize"],
  "tokenwire.v1.ModelService": ["ListModels", "GetModel"],
};

/** Where the gateway is, and how to open a channel to it. Its token stays private. */
export class Endpoint {
  /** HOST:PORT or any gRPC target. */
  readonly target: string;
  readonly #token: Token;
  readonly #credentials: grpc.ChannelCredentials;
  readonly #options: grpc.ChannelOptions;

  constructor(options: ConnectOptions, environment: Readonly<Record<string, string | undefined>>) {
    const target = options.target ?? (environment["TOKENWIRE_TARGET"] || DEFAULT_TARGET);
    if (typeof target !== "string" || target === "") {
      throw new TypeError(`target: expected an address such as "${DEFAULT_TARGET}"`);
    }
    if (/^(https?|grpcs?):\/\//.test(target)) {
      throw new TypeError(`target: expected HOST:PORT, without a scheme, got "${target}"`);
    }
    const token = options.token ?? environment["TOKENWIRE_TOKEN"] ?? "";
    if (typeof token !== "function") checked(token);
    this.target = target;
    this.#token = token;
    this.#credentials = credentials(options.tls ?? false);
    this.#options = { ...builtIn(), ...options.channelOptions };
  }

  /** A channel to it. */
  open(): grpc.Client {
    return new grpc.Client(this.target, this.#credentials, this.#options);
  }

  /**
   * Puts in the metadata who calls.
   *
   * Plain metadata rather than call credentials: gRPC refuses those on a plaintext channel, which
   * is what a client behind a service mesh has. Returns a promise only if the supplier did.
   */
  authorize(metadata: grpc.Metadata): void | Promise<void> {
    const given = typeof this.#token === "function" ? this.#token() : this.#token;
    if (given instanceof Promise) return given.then((token) => present(metadata, token));
    present(metadata, given);
  }
}

function present(metadata: grpc.Metadata, token: unknown): void {
  if (checked(token)) metadata.set("authorization", `Bearer ${token}`);
}

function checked(token: unknown): string {
  if (typeof token !== "string") {
    throw new TypeError(`token: expected a string, got ${token === null ? "null" : typeof token}`);
  }
  if (!/^[\x21-\x7e]*$/.test(token)) {
    // Never the token itself: this text ends up in logs.
    throw new TypeError("token: holds a space, a line end or a character outside ASCII");
  }
  return token;
}

function credentials(tls: Tls): grpc.ChannelCredentials {
  if (tls === false) return grpc.credentials.createInsecure();
  if (tls === true) return grpc.credentials.createSsl();
  if (typeof tls !== "object" || tls === null) {
    throw new TypeError(
      "tls: expected true, false, { ca, cert, key } of PEM texts or grpc.ChannelCredentials, " +
        `got ${tls === null ? "null" : typeof tls}`,
    );
  }
  if ("_isSecure" in tls) return tls;
  for (const name of Object.keys(tls)) {
    if (!["ca", "cert", "key"].includes(name)) {
      throw new TypeError(`tls: unknown key "${name}", expected ca, cert, key`);
    }
  }
  if ((tls.cert === undefined) !== (tls.key === undefined)) {
    throw new TypeError("tls: expected cert and key together");
  }
  return grpc.credentials.createSsl(
    pem(tls.ca, "tls.ca"),
    pem(tls.key, "tls.key"),
    pem(tls.cert, "tls.cert"),
  );
}

function pem(given: string | Uint8Array | undefined, where: string): Buffer | null {
  if (given === undefined) return null;
  const bytes = typeof given === "string" ? Buffer.from(given) : Buffer.from(given);
  if (!bytes.includes("-----BEGIN ")) {
    throw new TypeError(`${where}: expected PEM text, which has a line "-----BEGIN ..."`);
  }
  return bytes;
}

function builtIn(): grpc.ChannelOptions {
  return {
    "grpc.primary_user_agent": `tokenwire-typescript/${VERSION}`,
    "grpc.service_config": JSON.stringify(serviceConfig()),
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    // A model may think for minutes in silence. These pings notice a dead connection, and keep
    // proxies from dropping a live one; the gateway allows one per 10 s.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,
    // The default of 1 MiB would leave large prompts without retries.
    "grpc.per_rpc_retry_buffer_size": MAX_MESSAGE_BYTES,
    "grpc.retry_buffer_size": 4 * MAX_MESSAGE_BYTES,
    // A gateway that was restarted is back in less than gRPC's first pause of a second.
    "grpc.initial_reconnect_backoff_ms": 200,
  };
}

function serviceConfig(): object {
  return {
    loadBalancingConfig: [{ round_robin: {} }],
    methodConfig: [
      {
        name: Object.entries(RETRIED).flatMap(([service, methods]) =>
          methods.map((method) => ({ service, method })),
        ),
        retryPolicy: {
          maxAttempts: 3,
          initialBackoff: "0.2s",
          maxBackoff: "5s",
          backoffMultiplier: 2,
          retryableStatusCodes: ["UNAVAILABLE"],
        },
      },
    ],
    // Retries end while half of these are used up: a failure costs one, and ten calls that succeed
    // earn one. Enough for the calls of a replica that dies, not for an outage.
    retryThrottling: { maxTokens: 100, tokenRatio: 0.1 },
  };
}
