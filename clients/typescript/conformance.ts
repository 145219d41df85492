/**
 * Runs the conformance cases with the TypeScript client: tests/conformance/README.md.
 *
 * node dist/dev/conformance.js < lines
 */

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import {
  type BatchItemObject,
  type BatchResult,
  type CallOptions,
  type ChatOptions,
  type Prompt,
  type Reply,
  type RoleTemplate,
  type StreamEvent,
  type TlsOptions,
  Tokenwire,
  TokenwireError,
  type TokenwireOptions,
  type ToolDefinition,
} from "tokenwire";
import { Snapshot_State } from "tokenwire/v1";

interface Request {
  model: string;
  messages?: { role: string; content: string }[];
  prompt?: string;
  prompt_bytes?: number;
  temperature?: number;
  top_k?: number;
  max_completion_tokens?: number;
  choice_count?: number;
  stop?: string[];
  tools?: ToolDefinition[];
  tool_choice?: "auto" | "none" | "required";
  json_schema?: Record<string, unknown>;
  role_templates?: { role: string; api_role?: string; begin?: string; end?: string }[];
  unsupported_parameters?: "drop";
  extra_body?: Record<string, unknown>;
  labels?: Record<string, string>;
  texts?: string[];
  items?: (Request & { custom_id: string })[];
  max_concurrency?: number;
}

interface Case {
  name: string;
  op: "chat" | "stream" | "batch" | "batch_ordered" | "count_tokens" | "tokenize" | "models";
  request: Request;
  mode?: "cumulative";
  timeout_ms?: number;
  request_id?: string;
  metadata?: Record<string, string>;
  leave?: { after_text?: number; after_ms?: number };
  read_delay_ms?: number;
  pause_ms?: number;
  repeat?: number;
  gap_ms?: number;
}

interface Connect {
  target: string;
  token?: string;
  ca_file?: string;
  cert_file?: string;
  key_file?: string;
}

type Line = Record<string, unknown>;

for await (const text of createInterface({ input: process.stdin })) {
  const asked = JSON.parse(text) as { case: Case; connect: Connect };
  const line = { case: asked.case.name, ...(await answered(asked.case, asked.connect)) };
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

async function answered(asked: Case, connect: Connect): Promise<Line> {
  try {
    return await repeated(asked, connect);
  } catch (error) {
    if (error instanceof TokenwireError) return { ok: false, error: errorLine(error) };
    return { defect: error instanceof Error ? `${error.name}: ${error.message}` : String(error) };
  }
}

async function repeated(asked: Case, connect: Connect): Promise<Line> {
  await using client = new Tokenwire(connection(connect));
  let earlier = 0;
  for (let left = asked.repeat ?? 1; left > 1; left -= 1) {
    const line = await once(client, asked);
    if (line["ok"] === true) earlier += 1;
    await sleep(asked.gap_ms ?? 0);
  }
  return { ...(await once(client, asked)), earlier };
}

// --- what the client is told ----------------------------------------------------------

function connection(connect: Connect): TokenwireOptions {
  const options: TokenwireOptions = { target: connect.target, token: connect.token ?? "" };
  if (connect.ca_file !== undefined) {
    const tls: TlsOptions = { ca: readFileSync(connect.ca_file) };
    if (connect.cert_file !== undefined) tls.cert = readFileSync(connect.cert_file);
    if (connect.key_file !== undefined) tls.key = readFileSync(connect.key_file);
    options.tls = tls;
  }
  return options;
}

function callOptions(asked: Case): CallOptions {
  return {
    timeoutMs: asked.timeout_ms,
    requestId: asked.request_id,
    metadata: asked.metadata,
    signal: asked.leave?.after_ms === undefined ? undefined : later(asked.leave.after_ms),
  };
}

function later(ms: number): AbortSignal {
  const controller = new AbortController();
  setTimeout(() => controller.abort(), ms);
  return controller.signal;
}

function chatOptions(request: Request): Omit<ChatOptions, keyof CallOptions> {
  return {
    model: request.model,
    temperature: request.temperature,
    topK: request.top_k,
    maxCompletionTokens: request.max_completion_tokens,
    choiceCount: request.choice_count,
    stop: request.stop,
    tools: request.tools,
    toolChoice: request.tool_choice,
    jsonSchema: request.json_schema,
    roleTemplates: request.role_templates as RoleTemplate[] | undefined,
    unsupportedParameters: request.unsupported_parameters,
    extraBody: request.extra_body,
    labels: request.labels,
  };
}

function prompt(request: Request): Prompt {
  if (request.prompt_bytes !== undefined) return "a".repeat(request.prompt_bytes);
  return request.messages ?? request.prompt ?? "";
}

function items(request: Request): BatchItemObject[] {
  return (request.items ?? []).map((item) => ({
    messages: prompt(item),
    customId: item.custom_id,
    ...chatOptions(item),
  }));
}

// --- what the client says -------------------------------------------------------------

async function once(client: Tokenwire, asked: Case): Promise<Line> {
  const { request } = asked;
  const options = callOptions(asked);
  const batch = { ...options, maxConcurrency: request.max_concurrency };
  switch (asked.op) {
    case "chat": {
      const reply = await client.chat(prompt(request), { ...chatOptions(request), ...options });
      return replyLine(asked, reply);
    }
    case "stream":
      return await streamed(client, asked, { ...chatOptions(request), ...options });
    case "batch": {
      const results: BatchResult[] = [];
      for await (const result of client.batch(items(request), batch)) results.push(result);
      return resultsLine(results.sort((a, b) => a.index - b.index));
    }
    case "batch_ordered":
      return resultsLine(await client.batchOrdered(items(request), batch));
    case "count_tokens": {
      const { model } = request;
      const count = await client.countTokens(prompt(request), { model, ...options });
      return { ok: true, tokens: count.totalTokens, tokenizer: count.tokenizer };
    }
    case "tokenize": {
      const { model, texts = [] } = request;
      const lists = await client.tokenize(texts, { model, ...options });
      return {
        ok: true,
        ids: lists.map(({ ids }) => ids),
        pieces: lists.map(({ pieces }) =>
          pieces.map((piece) => Buffer.from(piece).toString("hex")),
        ),
      };
    }
    case "models":
      return { ok: true, models: (await client.models(options)).map(({ name }) => name) };
  }
}

async function streamed(client: Tokenwire, asked: Case, options: ChatOptions): Promise<Line> {
  const stream = client.stream(prompt(asked.request), { ...options, mode: asked.mode });
  const kinds: string[] = [];
  const states: string[] = [];
  let pause = asked.pause_ms ?? 0;
  for await (const event of stream) {
    if (kinds.at(-1) !== event.kind) kinds.push(event.kind);
    const state = stateOf(event);
    if (state !== undefined && states.at(-1) !== state) states.push(state);
    const wait = pause + (asked.read_delay_ms ?? 0);
    pause = 0;
    if (wait > 0) await sleep(wait);
    const enough = asked.leave?.after_text;
    if (enough !== undefined && stream.text.length >= enough) {
      return { ok: true, left: true, partial_text: stream.text };
    }
  }
  const line = { ...replyLine(asked, await stream.reply()), kinds };
  return states.length > 0 ? { ...line, states } : line;
}

function stateOf({ proto: { event } }: StreamEvent): string | undefined {
  return event.case === "snapshot" ? Snapshot_State[event.value.state] : undefined;
}

function replyLine(asked: Case, reply: Reply): Line {
  const { usage, header } = reply;
  return {
    ok: true,
    choices: reply.choices.map((choice) => ({
      index: choice.index,
      text: choice.text,
      reasoning: choice.reasoning,
      finish_reason: choice.finishReason.toUpperCase(),
      tool_calls: choice.toolCalls.map((call) => ({
        id: call.id,
        name: call.name,
        arguments: call.arguments,
      })),
    })),
    usage: {
      prompt: usage.promptTokens,
      completion: usage.completionTokens,
      total: usage.totalTokens,
      estimated: usage.estimated,
    },
    header: {
      model: header.model,
      upstream: header.upstream,
      attempts: header.attempts.length,
      dropped: header.droppedParameters,
    },
    request_id: reply.requestId !== "",
    ...(asked.request.json_schema !== undefined && { json: reply.json() }),
  };
}

function resultsLine(results: BatchResult[]): Line {
  return {
    ok: true,
    results: results.map(({ index, customId, reply, error }) => ({
      index,
      custom_id: customId,
      ...(error === undefined ? { text: reply.text } : { error: errorLine(error) }),
    })),
  };
}

function errorLine(error: TokenwireError): Line {
  return {
    code: error.code,
    reason: error.reason,
    retry_after_ms: error.retryAfterMs === undefined ? null : Math.round(error.retryAfterMs),
    retryable: error.isRetryable,
    attempts: error.attempts,
    request_id: error.requestId !== "",
    partial_text: error.partialText,
    fields: error.fieldViolations.map(({ field }) => field),
  };
}
