package io.tokenwire;

import io.tokenwire.v1.ChatRequest;
import io.tokenwire.v1.JsonObjectFormat;
import io.tokenwire.v1.JsonSchemaFormat;
import io.tokenwire.v1.ResponseFormat;
import io.tokenwire.v1.RoleTemplate;
import io.tokenwire.v1.UnsupportedParameterPolicy;
import java.util.List;
import java.util.Map;
import java.util.function.Consumer;

/**
 * What to ask: model, conversation, parameters. Immutable; what is not set is the model's default.
 *
 * <p>Ranges are the gateway's to judge: it names the field and knows the model.
 */
public final class ChatParams {
  private final ChatRequest proto;

  private ChatParams(ChatRequest proto) {
    this.proto = proto;
  }

  /**
   * Begins with nothing set.
   *
   * @return a builder
   */
  public static Builder builder() {
    return new Builder(ChatRequest.newBuilder());
  }

  /**
   * A request of the contract.
   *
   * @param proto the request
   * @return the same
   * @throws IllegalArgumentException without model or messages
   */
  public static ChatParams of(ChatRequest proto) {
    return new Builder(Checked.set(proto, "request").toBuilder()).build();
  }

  static ChatParams of(Consumer<Builder> set) {
    Builder builder = builder();
    Checked.set(set, "params").accept(builder);
    return builder.build();
  }

  /**
   * Begins with these.
   *
   * @return a builder
   */
  public Builder toBuilder() {
    return new Builder(proto.toBuilder());
  }

  /**
   * The message of the contract.
   *
   * @return the message
   */
  public ChatRequest proto() {
    return proto;
  }

  @Override
  public boolean equals(Object other) {
    return other instanceof ChatParams params && params.proto.equals(proto);
  }

  @Override
  public int hashCode() {
    return proto.hashCode();
  }

  @Override
  public String toString() {
    return "ChatParams["
        + proto.getModel()
        + ", "
        + proto.getMessagesCount()
        + " messages]"; // not their text: it ends up in logs
  }

  /** Sets what to ask. Not for several threads at once. */
  public static final class Builder {
    private final ChatRequest.Builder proto;

    Builder(ChatRequest.Builder proto) {
      this.proto = proto;
    }

    /**
     * Makes the parameters; the builder may be used on.
     *
     * @return the parameters
     * @throws IllegalArgumentException without model or messages
     */
    public ChatParams build() {
      if (proto.getModel().isEmpty()) {
        throw new IllegalArgumentException(
            "model: expected the name of a model, for example \"gpt-4o-mini\"");
      }
      if (proto.getMessagesCount() == 0) {
        throw new IllegalArgumentException("messages: expected at least one message");
      }
      return new ChatParams(proto.build());
    }

    /**
     * Sets the model.
     *
     * @param name name or alias; see {@link TokenwireClient#models}
     * @return this
     */
    public Builder model(String name) {
      proto.setModel(Checked.text(name, "model"));
      return this;
    }

    /**
     * Adds instructions.
     *
     * @param text the text
     * @return this
     */
    public Builder system(String text) {
      return message(Message.system(text));
    }

    /**
     * Adds what the user says.
     *
     * @param text the text
     * @return this
     */
    public Builder user(String text) {
      return message(Message.user(text));
    }

    /**
     * Adds what the model said earlier.
     *
     * @param text the text
     * @return this
     */
    public Builder assistant(String text) {
      return message(Message.assistant(text));
    }

    /**
     * Adds a turn to the conversation.
     *
     * @param message the turn; of a reply, {@link Reply#message}
     * @return this
     */
    public Builder message(Message message) {
      proto.addMessages(Checked.set(message, "message").proto());
      return this;
    }

    /**
     * Adds a conversation.
     *
     * @param messages the turns, oldest first
     * @return this
     */
    public Builder messages(List<Message> messages) {
      Checked.set(messages, "messages").forEach(this::message);
      return this;
    }

    /**
     * Sets the randomness.
     *
     * @param value 0 is the most deterministic; in [0, 2]
     * @return this
     */
    public Builder temperature(double value) {
      proto.getParamsBuilder().setTemperature(value);
      return this;
    }

    /**
     * Samples from the smallest set of tokens with this total probability.
     *
     * @param value in (0, 1]
     * @return this
     */
    public Builder topP(double value) {
      proto.getParamsBuilder().setTopP(value);
      return this;
    }

    /**
     * Samples from this many most likely tokens.
     *
     * @param value 1 or more; not every upstream takes it
     * @return this
     */
    public Builder topK(int value) {
      proto.getParamsBuilder().setTopK(value);
      return this;
    }

    /**
     * Drops tokens less likely than this share of the most likely one.
     *
     * @param value in [0, 1]; not every upstream takes it
     * @return this
     */
    public Builder minP(double value) {
      proto.getParamsBuilder().setMinP(value);
      return this;
    }

    /**
     * Limits the generated tokens, reasoning included.
     *
     * @param value 1 or more
     * @return this
     */
    public Builder maxCompletionTokens(int value) {
      proto.getParamsBuilder().setMaxCompletionTokens(value);
      return this;
    }

    /**
     * Adds a penalty per earlier occurrence of a token.
     *
     * @param value 0 is neutral; in [-2, 2]
     * @return this
     */
    public Builder frequencyPenalty(double value) {
      proto.getParamsBuilder().setFrequencyPenalty(value);
      return this;
    }

    /**
     * Adds a penalty once a token has occurred.
     *
     * @param value 0 is neutral; in [-2, 2]
     * @return this
     */
    public Builder presencePenalty(double value) {
      proto.getParamsBuilder().setPresencePenalty(value);
      return this;
    }

    /**
     * Multiplies by a penalty.
     *
     * @param value 1 is neutral; not every upstream takes it
     * @return this
     */
    public Builder repetitionPenalty(double value) {
      proto.getParamsBuilder().setRepetitionPenalty(value);
      return this;
    }

    /**
     * Asks for the same answer as before, as far as the upstream can.
     *
     * @param value any number
     * @return this
     */
    public Builder seed(long value) {
      proto.getParamsBuilder().setSeed(value);
      return this;
    }

    /**
     * Asks for several answers ({@code n} elsewhere).
     *
     * @param value in [1, 128]
     * @return this
     */
    public Builder choiceCount(int value) {
      proto.getParamsBuilder().setChoiceCount(value);
      return this;
    }

    /**
     * Asks for log probabilities.
     *
     * @param value whether to return them
     * @return this
     */
    public Builder logprobs(boolean value) {
      proto.getParamsBuilder().setLogprobs(value);
      return this;
    }

    /**
     * Asks for alternatives to each token; needs {@link #logprobs}.
     *
     * @param value in [0, 20]
     * @return this
     */
    public Builder topLogprobs(int value) {
      proto.getParamsBuilder().setTopLogprobs(value);
      return this;
    }

    /**
     * Turns thinking on or off, where the model allows it.
     *
     * @param value whether to think
     * @return this
     */
    public Builder enableThinking(boolean value) {
      proto.getParamsBuilder().setEnableThinking(value);
      return this;
    }

    /**
     * Allows several tool calls in one turn.
     *
     * @param value whether to allow them
     * @return this
     */
    public Builder parallelToolCalls(boolean value) {
      proto.getParamsBuilder().setParallelToolCalls(value);
      return this;
    }

    /**
     * Sets how much the model reasons.
     *
     * @param value such as {@code low}, {@code medium}, {@code high}
     * @return this
     */
    public Builder reasoningEffort(String value) {
      proto.getParamsBuilder().setReasoningEffort(Checked.text(value, "reasoningEffort"));
      return this;
    }

    /**
     * Sets how much the model says.
     *
     * @param value {@code low}, {@code medium} or {@code high}
     * @return this
     */
    public Builder verbosity(String value) {
      proto.getParamsBuilder().setVerbosity(Checked.text(value, "verbosity"));
      return this;
    }

    /**
     * Sets where to stop.
     *
     * @param strings at most 16; never part of the text
     * @return this
     */
    public Builder stop(String... strings) {
      proto.getParamsBuilder().clearStop();
      for (String each : strings) {
        proto.getParamsBuilder().addStop(Checked.text(each, "stop"));
      }
      return this;
    }

    /**
     * Sets biases of tokens.
     *
     * @param biases token id to bias, in [-100, 100]
     * @return this
     */
    public Builder logitBias(Map<Integer, Double> biases) {
      proto.getParamsBuilder().clearLogitBias().putAllLogitBias(Checked.set(biases, "logitBias"));
      return this;
    }

    /**
     * Sets the tools the model may call.
     *
     * @param tools the tools
     * @return this
     */
    public Builder tools(Tool... tools) {
      return tools(List.of(tools));
    }

    /**
     * Sets the tools the model may call.
     *
     * @param tools the tools
     * @return this
     */
    public Builder tools(List<Tool> tools) {
      proto.clearTools();
      Checked.set(tools, "tools").forEach(each -> proto.addTools(each.proto()));
      return this;
    }

    /**
     * Sets which tools the model may or must call.
     *
     * @param choice such as {@link ToolChoice#REQUIRED}
     * @return this
     */
    public Builder toolChoice(ToolChoice choice) {
      proto.setToolChoice(Checked.set(choice, "toolChoice").proto());
      return this;
    }

    /**
     * Asks for JSON of a schema; {@link Reply#json(Class)} parses it.
     *
     * @param name a name for it, of letters, digits, {@code _} and {@code -}
     * @param schema JSON Schema; its keys are sent in the map's order
     * @return this
     */
    public Builder jsonSchema(String name, Map<String, ?> schema) {
      return jsonSchema(
          name, Json.write(Json.GSON, Checked.set(schema, "jsonSchema"), "jsonSchema"));
    }

    /**
     * Asks for JSON of a schema; {@link Reply#json(Class)} parses it.
     *
     * @param name a name for it, of letters, digits, {@code _} and {@code -}
     * @param schema JSON Schema text
     * @return this
     */
    public Builder jsonSchema(String name, String schema) {
      return jsonSchema(format(name, schema));
    }

    /**
     * Asks for JSON of a schema, which the upstream is to enforce; {@link Reply#json(Class)} parses
     * it.
     *
     * @param name a name for it, of letters, digits, {@code _} and {@code -}
     * @param schema JSON Schema text
     * @return this
     */
    public Builder strictJsonSchema(String name, String schema) {
      return jsonSchema(format(name, schema).setStrict(true));
    }

    private static JsonSchemaFormat.Builder format(String name, String schema) {
      return JsonSchemaFormat.newBuilder()
          .setName(Checked.text(name, "jsonSchema"))
          .setSchemaJson(Checked.text(schema, "jsonSchema"));
    }

    private Builder jsonSchema(JsonSchemaFormat.Builder format) {
      return responseFormat(ResponseFormat.newBuilder().setJsonSchema(format).build());
    }

    /**
     * Asks for a JSON object of no particular schema; {@link Reply#json()} parses it.
     *
     * @return this
     */
    public Builder jsonObject() {
      return responseFormat(
          ResponseFormat.newBuilder().setJsonObject(JsonObjectFormat.getDefaultInstance()).build());
    }

    /**
     * Sets the shape of the answer, for what {@link #jsonSchema} has no words for.
     *
     * @param format a format of the contract
     * @return this
     */
    public Builder responseFormat(ResponseFormat format) {
      proto.setResponseFormat(Checked.set(format, "responseFormat"));
      return this;
    }

    /**
     * Adds how a role of yours is written for the upstream.
     *
     * @param role the role in your messages
     * @param apiRole the role sent upstream, for example {@code system}
     * @param begin text put before the content
     * @param end text put after the content
     * @return this
     */
    public Builder roleTemplate(String role, String apiRole, String begin, String end) {
      proto.addRoleTemplates(
          RoleTemplate.newBuilder()
              .setRole(Checked.text(role, "role"))
              .setApiRole(Checked.text(apiRole, "apiRole"))
              .setBegin(Checked.text(begin, "begin"))
              .setEnd(Checked.text(end, "end")));
      return this;
    }

    /**
     * Tells who the end user is.
     *
     * @param value a stable pseudonym
     * @return this
     */
    public Builder endUserId(String value) {
      proto.setEndUserId(Checked.text(value, "endUserId"));
      return this;
    }

    /**
     * Hints at a cache bucket.
     *
     * @param value the bucket
     * @return this
     */
    public Builder promptCacheKey(String value) {
      proto.setPromptCacheKey(Checked.text(value, "promptCacheKey"));
      return this;
    }

    /**
     * Asks for a tier of service.
     *
     * @param value such as {@code flex} or {@code priority}
     * @return this
     */
    public Builder serviceTier(String value) {
      proto.setServiceTier(Checked.text(value, "serviceTier"));
      return this;
    }

    /**
     * Sets what becomes of a parameter the upstream does not take.
     *
     * @param drop true to drop it, and name it in {@link ReplyHeader#droppedParameters}; false, the default, to fail
     * @return this
     */
    public Builder dropUnsupportedParameters(boolean drop) {
      proto.setUnsupportedParameterPolicy(
          drop
              ? UnsupportedParameterPolicy.UNSUPPORTED_PARAMETER_POLICY_DROP
              : UnsupportedParameterPolicy.UNSUPPORTED_PARAMETER_POLICY_REJECT);
      return this;
    }

    /**
     * Adds a label for accounting.
     *
     * @param key its name
     * @param value its value
     * @return this
     */
    public Builder label(String key, String value) {
      proto.putLabels(Checked.text(key, "label"), Checked.text(value, "label"));
      return this;
    }

    /**
     * Merges fields into the upstream's request last, for what is not modelled here.
     *
     * @param fields names to values
     * @return this
     */
    public Builder extraBody(Map<String, ?> fields) {
      return extraBody(Json.write(Json.GSON, Checked.set(fields, "extraBody"), "extraBody"));
    }

    /**
     * Merges fields into the upstream's request last, for what is not modelled here.
     *
     * @param json JSON object text
     * @return this
     */
    public Builder extraBody(String json) {
      proto.setExtraBodyJson(Checked.text(json, "extraBody"));
      return this;
    }
  }
}
