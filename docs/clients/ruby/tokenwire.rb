# frozen_string_literal: true

# Chats with the models behind a Tokenwire gateway. ../adding-a-language.md explains each part.

require "json"
require "securerandom"
require "grpc"
require "google/protobuf/well_known_types"
require "google/rpc/error_details_pb"
require "google/rpc/status_pb"
require "tokenwire/v1/chat_service_services_pb"
require "tokenwire/v1/model_service_services_pb"
require "tokenwire/v1/tokenizer_service_services_pb"

module Tokenwire
  MAX_MESSAGE_BYTES = 32 * 1024 * 1024
  DEFAULT_TIMEOUT = 600 # seconds, where the caller sets none

  RETRIED = %w[ChatService TokenizerService ModelService].freeze

  SERVICE_CONFIG = {
    loadBalancingConfig: [{ round_robin: {} }],
    methodConfig: [{
      name: RETRIED.map { |service| { service: "tokenwire.v1.#{service}" } },
      retryPolicy: {
        maxAttempts: 3, initialBackoff: "0.2s", maxBackoff: "5s", backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"]
      }
    }],
    retryThrottling: { maxTokens: 100, tokenRatio: 0.1 }
  }.freeze

  CHANNEL_OPTIONS = {
    "grpc.service_config" => JSON.generate(SERVICE_CONFIG),
    "grpc.max_send_message_length" => MAX_MESSAGE_BYTES,
    "grpc.max_receive_message_length" => MAX_MESSAGE_BYTES,
    "grpc.keepalive_time_ms" => 30_000,
    "grpc.keepalive_timeout_ms" => 20_000,
    "grpc.keepalive_permit_without_calls" => 1,
    "grpc.http2.max_pings_without_data" => 0,
    "grpc.primary_user_agent" => "tokenwire-ruby-example"
  }.freeze

  # Calls a gateway. One is enough for a process: threads may share it.
  class Client
    # `tls` holds PEM texts: { authorities:, key:, certificate: }, each may be absent; nil is
    # plaintext. `options` are gRPC channel options, each in place of the built-in one.
    def initialize(target, token: nil, tls: nil, options: {})
      @credentials = tls && GRPC::Core::ChannelCredentials.new(
        tls[:authorities], tls[:key], tls[:certificate]
      )
      @channel = GRPC::Core::Channel.new(
        target, CHANNEL_OPTIONS.merge(options), @credentials || :this_channel_is_insecure
      )
      @token = token
      @chat = stub(V1::ChatService)
      @tokens = stub(V1::TokenizerService)
      @models = stub(V1::ModelService)
    end

    def close
      @channel.close
    end

    # The whole answer, a Reply. Gives the running call to a block, which may keep it: `cancel`.
    def chat(request, **options)
      operation = begin_call(@chat, :chat, request, options)
      yield operation if block_given?
      answer = answer_of(operation)
      Reply.new(request_id: operation.trailing_metadata["x-request-id"]).take_answer(answer)
    end

    # The answer as it grows, a Stream.
    def stream(request, mode: :STREAM_MODE_DELTA, **options)
      wrapped = V1::StreamChatRequest.new(chat: request, mode: mode)
      Stream.new(begin_call(@chat, :stream_chat, wrapped, options))
    end

    # Yields [index, custom_id, Reply or Error] of each conversation when it is ready. `items`
    # are pairs of a custom id and a request.
    def batch(items, max_concurrency: 0, **options, &block)
      items = items.map { |id, request| { custom_id: id, chat: request } }
      request = V1::BatchChatRequest.new(items: items, max_concurrency: max_concurrency)
      operation = begin_call(@chat, :batch_chat, request, options)
      Tokenwire.read(operation) { |answer| block.call(result_of(answer)) }
    end

    # As `batch`, but in the order of `items`, when all are there.
    def batch_ordered(items, **options)
      results = []
      batch(items, **options) { |result| results[result.first] = result }
      results
    end

    # A CountTokensResponse.
    def count_tokens(text, model:, **options)
      request = V1::CountTokensRequest.new(model: model, text: text)
      answer_of(begin_call(@tokens, :count_tokens, request, options))
    end

    # A TokenList for each text.
    def tokenize(texts, model:, **options)
      request = V1::TokenizeRequest.new(model: model, texts: texts)
      answer_of(begin_call(@tokens, :tokenize, request, options)).lists
    end

    # Every Model, over all pages.
    def models(**options)
      found = []
      page = ""
      loop do
        request = V1::ListModelsRequest.new(page_token: page)
        answer = answer_of(begin_call(@models, :list_models, request, options))
        found.concat(answer.models.to_a)
        page = answer.next_page_token
        return found if page.empty?
      end
    end

    private

    def stub(service)
      service::Stub.new(nil, nil, channel_override: @channel)
    end

    def begin_call(stub, method, request, options)
      timeout = options.fetch(:timeout, DEFAULT_TIMEOUT)
      metadata = { "x-request-id" => options[:request_id] || SecureRandom.uuid }
      metadata["authorization"] = "Bearer #{@token}" if @token
      metadata.merge!(options.fetch(:metadata, {}))
      stub.public_send(
        method, request, return_op: true, deadline: Time.now + timeout, metadata: metadata
      )
    end

    def answer_of(operation)
      operation.execute
    rescue GRPC::BadStatus => e
      raise Error.of_call(e)
    end

    def result_of(answer)
      if answer.result == :error
        outcome = Error.of_status(answer.error)
      else
        outcome = Reply.new.take_answer(answer.response)
      end
      [answer.index, answer.custom_id, outcome]
    end
  end

  # Reads a stream of answers to its end. Whoever leaves the block early, by `break` or an
  # exception, cancels the call, and with it what the upstream does.
  def self.read(operation)
    done = false
    operation.execute.each { |message| yield message }
    done = true
  rescue GRPC::BadStatus => e
    done = true
    raise Error.of_call(e)
  rescue GRPC::Core::CallError => e
    # So gRPC for Ruby tells of a call that ended before its first byte: cancelled, or too late.
    code = Time.now < operation.deadline ? "CANCELLED" : "DEADLINE_EXCEEDED"
    raise Error.new("#{code.downcase}: #{e.message}", code: code, reason: "")
  ensure
    operation.cancel unless done
  end

  # One choice of an answer, as far as it has come.
  Choice = Struct.new(:text, :reasoning, :finish_reason, :tool_calls) do
    def self.empty
      new(+"", +"", nil, {})
    end
  end

  ToolCall = Struct.new(:id, :name, :arguments)

  # An answer put together from a whole one, or from events.
  class Reply
    attr_reader :header, :usage, :choices, :request_id

    def initialize(request_id: nil)
      @choices = Hash.new { |choices, index| choices[index] = Choice.empty }
      @request_id = request_id
      @usage = V1::Usage.new
    end

    def text
      @choices.key?(0) ? @choices[0].text : ""
    end

    # The text of an answer by json_schema, parsed.
    def json
      JSON.parse(text)
    end

    def take_answer(answer)
      @header = answer.header
      @usage = answer.usage || @usage
      answer.choices.each do |choice|
        take_message(choice.index, choice.message)
        @choices[choice.index].finish_reason = choice.finish_reason
      end
      self
    end

    def take_event(event)
      case event.event
      when :header then @header = event.header
      when :delta then take_delta(event.delta)
      when :snapshot then take_message(event.snapshot.choice_index, event.snapshot.message)
      when :finish then take_finish(event.finish)
      when :trailer then @usage = event.trailer.usage || @usage
      end
    end

    private

    def take_delta(delta)
      choice = @choices[delta.choice_index]
      choice.text << delta.content
      choice.reasoning << delta.reasoning
      delta.tool_calls.each do |part|
        call = choice.tool_calls[part.index] ||= ToolCall.new(part.id, part.name, +"")
        call.arguments << part.arguments
      end
    end

    def take_finish(finish)
      @choices[finish.choice_index].finish_reason = finish.finish_reason
    end

    def take_message(index, message)
      choice = @choices[index]
      choice.text = message.content.dup
      choice.reasoning = message.reasoning.dup
      message.tool_calls.each_with_index do |call, position|
        choice.tool_calls[position] =
          ToolCall.new(call.id, call.function.name, call.function.arguments_json)
      end
    end
  end

  # An answer that grows: `each` yields its events, `reply` is what has come so far.
  class Stream
    include Enumerable
    attr_reader :reply

    def initialize(operation)
      @operation = operation
      @reply = Reply.new
    end

    def each
      whole = false
      Tokenwire.read(@operation) do |event|
        next if event.event.nil? # a heartbeat

        @reply.take_event(event)
        whole = event.event == :trailer
        yield event
      end
      raise Error.incomplete(@reply) unless whole
    rescue Error => e
      e.partial ||= @reply
      e.broke_off unless @reply.text.empty?
      raise
    end

    # From any thread.
    def cancel
      @operation.cancel
    end
  end

  # A call that failed.
  class Error < StandardError
    # The gRPC code ("UNAVAILABLE"); the gateway's reason ("RATE_LIMITED"), "" if the status is
    # not the gateway's; seconds to wait, or nil; paths of wrong fields; the ErrorInfo's metadata.
    attr_reader :code, :reason, :retry_after, :request_id, :fields, :metadata
    # Of a stream: the Reply as far as it had come.
    attr_accessor :partial

    CODES = GRPC::Core::StatusCodes.constants.to_h do |name|
      [GRPC::Core::StatusCodes.const_get(name), name.to_s]
    end.freeze

    def self.of_call(error)
      trailers = error.metadata
      status = error.to_rpc_status
      status ||= Google::Rpc::Status.new(code: error.code, message: error.details)
      of_status(status, request_id: trailers["x-request-id"],
                        pushback: trailers["grpc-retry-pushback-ms"])
    end

    def self.of_status(status, request_id: nil, pushback: nil)
      details = [Google::Rpc::ErrorInfo, Google::Rpc::RetryInfo, Google::Rpc::BadRequest]
      info, retrying, refused = details.map do |kind|
        status.details.find { |detail| detail.is(kind) }&.unpack(kind)
      end
      info = nil unless info&.domain == "tokenwire"
      delay = retrying&.retry_delay
      wait = delay ? delay.seconds + delay.nanos / 1e9 : nil
      wait ||= pushback.to_i / 1000.0 if pushback.to_i.positive?
      new(
        status.message,
        code: CODES.fetch(status.code, "UNKNOWN"), reason: info ? info.reason : "",
        metadata: info ? info.metadata.to_h : {}, retry_after: wait, request_id: request_id,
        fields: refused ? refused.field_violations.map(&:field) : []
      )
    end

    # OK without a trailer: a proxy, or a bug. Never take it for an answer.
    def self.incomplete(partial)
      new(
        "the stream ended before the answer was whole",
        code: "UNAVAILABLE", reason: "STREAM_INCOMPLETE", partial: partial
      )
    end

    # Of a stream with text: UNAVAILABLE without a reason is a connection that broke. Nobody was left
    # to say so.
    def broke_off
      @reason = "UPSTREAM_STREAM_INTERRUPTED" if @reason.empty? && @code == "UNAVAILABLE"
    end

    def initialize(message, code:, reason:, metadata: {}, retry_after: nil, request_id: nil,
                   fields: [], partial: nil)
      super(message)
      @code = code
      @reason = reason
      @metadata = metadata
      @retry_after = retry_after
      @request_id = metadata["requestId"] || request_id
      @fields = fields
      @partial = partial
    end

    # Whether the same call may succeed later. The channel has made its own retries by then.
    def retryable?
      code == "RESOURCE_EXHAUSTED" ? !retry_after.nil? : code == "UNAVAILABLE"
    end

    def attempts
      metadata["attempts"].to_i
    end
  end
end
