# frozen_string_literal: true

# Runs the conformance cases with the client beside it: tests/conformance/README.md.

require "tokenwire"

# The chat a case describes.
def request_of(asked)
  content = asked["prompt_bytes"] ? "a" * asked["prompt_bytes"] : asked["prompt"]
  messages = asked["messages"] || [{ "role" => "user", "content" => content }]
  request = Tokenwire::V1::ChatRequest.new(
    model: asked["model"],
    messages: messages.map { |each| Tokenwire::V1::ChatMessage.new(each.transform_keys(&:to_sym)) },
    params: Tokenwire::V1::GenerationParams.new(params_of(asked)),
    tools: (asked["tools"] || []).map { |tool| tool_of(tool) },
    labels: asked["labels"] || {},
    role_templates: (asked["role_templates"] || []).map { |each| role_template_of(each) }
  )
  if asked["tool_choice"]
    mode = :"MODE_#{asked['tool_choice'].upcase}"
    request.tool_choice = Tokenwire::V1::ToolChoice.new(mode: mode)
  end
  if asked["json_schema"]
    schema = { name: "answer", schema_json: JSON.generate(asked["json_schema"]), strict: true }
    request.response_format = Tokenwire::V1::ResponseFormat.new(
      json_schema: Tokenwire::V1::JsonSchemaFormat.new(schema)
    )
  end
  if asked["unsupported_parameters"] == "drop"
    request.unsupported_parameter_policy = :UNSUPPORTED_PARAMETER_POLICY_DROP
  end
  request.extra_body_json = JSON.generate(asked["extra_body"]) if asked["extra_body"]
  request
end

def params_of(asked)
  names = %w[temperature top_k max_completion_tokens choice_count stop]
  asked.slice(*names).transform_keys(&:to_sym)
end

def tool_of(tool)
  function = Tokenwire::V1::FunctionTool.new(
    name: tool["name"], description: tool["description"],
    parameters_schema_json: JSON.generate(tool["parameters"])
  )
  Tokenwire::V1::Tool.new(function: function)
end

def role_template_of(template)
  Tokenwire::V1::RoleTemplate.new(template.transform_keys(&:to_sym))
end

def options_of(kase)
  options = {}
  options[:timeout] = kase["timeout_ms"] / 1000.0 if kase["timeout_ms"]
  options[:request_id] = kase["request_id"] if kase["request_id"]
  options[:metadata] = kase["metadata"] if kase["metadata"]
  options
end

# --- what is printed --------------------------------------------------------------------

def answer_line(kase, reply)
  line = {
    ok: true,
    choices: reply.choices.sort.map { |index, choice| choice_line(index, choice) },
    usage: { prompt: reply.usage.prompt_tokens, completion: reply.usage.completion_tokens,
             total: reply.usage.total_tokens, estimated: reply.usage.estimated },
    header: { model: reply.header.model, upstream: reply.header.upstream,
              attempts: reply.header.attempts.size, dropped: reply.header.dropped_parameters.to_a },
    request_id: true
  }
  line[:json] = reply.json if kase["request"]["json_schema"]
  line
end

def choice_line(index, choice)
  calls = choice.tool_calls.sort.map do |_, call|
    { id: call.id, name: call.name, arguments: JSON.parse(call.arguments) }
  end
  { index: index, text: choice.text, reasoning: choice.reasoning,
    finish_reason: choice.finish_reason.to_s.delete_prefix("FINISH_REASON_"), tool_calls: calls }
end

def error_line(error)
  {
    code: error.code, reason: error.reason, retryable: error.retryable?, attempts: error.attempts,
    retry_after_ms: error.retry_after && (error.retry_after * 1000).round,
    request_id: !error.request_id.to_s.empty?, fields: error.fields,
    partial_text: error.partial ? error.partial.text : ""
  }
end

def results_line(results)
  rows = results.sort_by(&:first).map do |index, custom_id, outcome|
    failed = outcome.is_a?(Tokenwire::Error)
    { index: index, custom_id: custom_id }.merge(
      failed ? { error: error_line(outcome) } : { text: outcome.text }
    )
  end
  { ok: true, results: rows }
end

# --- the operations -----------------------------------------------------------------------

# Cancels `call` in so many milliseconds; nil is never.
def later(milliseconds, call)
  return yield if milliseconds.nil?

  timer = Thread.new do
    sleep(milliseconds / 1000.0)
    call.cancel
  end
  begin
    yield
  ensure
    timer.kill.join
  end
end

def chat(client, kase)
  timer = nil
  reply = client.chat(request_of(kase["request"]), **options_of(kase)) do |call|
    after = kase.dig("leave", "after_ms")
    timer = Thread.new { sleep(after / 1000.0) and call.cancel } if after
  end
  answer_line(kase, reply).merge(request_id: !reply.request_id.to_s.empty?)
ensure
  timer&.kill&.join
end

def stream(client, kase)
  mode = kase["mode"] == "cumulative" ? :STREAM_MODE_CUMULATIVE : :STREAM_MODE_DELTA
  stream = client.stream(request_of(kase["request"]), mode: mode, **options_of(kase))
  kinds = []
  states = []
  left = false
  pause = kase.fetch("pause_ms", 0)
  later(kase.dig("leave", "after_ms"), stream) do
    stream.each do |event|
      kinds << event.event.to_s
      states << event.snapshot.state.to_s.delete_prefix("STATE_") if event.event == :snapshot
      sleep((kase.fetch("read_delay_ms", 0) + pause) / 1000.0)
      pause = 0
      enough = kase.dig("leave", "after_text")
      if enough && stream.reply.text.length >= enough
        left = true
        break
      end
    end
  end
  return { ok: true, left: true, partial_text: stream.reply.text } if left

  line = answer_line(kase, stream.reply).merge(kinds: once(kinds))
  states.empty? ? line : line.merge(states: once(states))
end

# Repetitions in a row counted once.
def once(names)
  names.chunk_while { |one, other| one == other }.map(&:first)
end

def run_once(client, kase)
  asked = kase["request"]
  options = options_of(kase)
  case kase["op"]
  when "chat" then chat(client, kase)
  when "stream" then stream(client, kase)
  when "batch", "batch_ordered"
    items = asked["items"].map { |item| [item["custom_id"], request_of(item)] }
    options[:max_concurrency] = asked["max_concurrency"] if asked["max_concurrency"]
    if kase["op"] == "batch"
      results = []
      client.batch(items, **options) { |result| results << result }
      results_line(results)
    else
      results_line(client.batch_ordered(items, **options))
    end
  when "count_tokens"
    count = client.count_tokens(asked["prompt"], model: asked["model"], **options)
    { ok: true, tokens: count.total_tokens, tokenizer: count.tokenizer }
  when "tokenize"
    lists = client.tokenize(asked["texts"], model: asked["model"], **options)
    { ok: true, ids: lists.map { |list| list.ids.to_a },
      pieces: lists.map { |list| list.pieces.map { |piece| piece.unpack1("H*") } } }
  when "models" then { ok: true, models: client.models(**options).map(&:name) }
  else raise "no op #{kase['op']}"
  end
end

def tls_of(connect)
  return unless connect["ca_file"]

  files = { authorities: "ca_file", key: "key_file", certificate: "cert_file" }
  files.transform_values { |name| connect[name] && File.read(connect[name]) }
end

def run(kase, connect)
  client = Tokenwire::Client.new(connect["target"], token: connect["token"], tls: tls_of(connect))
  earlier = 0
  (kase.fetch("repeat", 1) - 1).times do
    earlier += 1 if run_once(client, kase)[:ok]
    sleep(kase["gap_ms"] / 1000.0)
  end
  run_once(client, kase).merge(earlier: earlier)
rescue Tokenwire::Error => e
  { ok: false, error: error_line(e) }
rescue StandardError => e
  { defect: "#{e.class}: #{e.message}" }
ensure
  client&.close
end

$stdin.set_encoding("UTF-8")
$stdin.each_line do |text|
  asked = JSON.parse(text)
  line = run(asked["case"], asked["connect"])
  puts JSON.generate({ case: asked["case"]["name"] }.merge(line))
  $stdout.flush
end
