package io.tokenwire;

import java.util.Map;

/** A call the model wants made. */
public final class ToolCall {
  private final io.tokenwire.v1.ToolCall proto;
  private final JsonCodec json;

  ToolCall(io.tokenwire.v1.ToolCall proto, JsonCodec json) {
    this.proto = proto;
    this.json = json;
  }

  /**
   * Identifier that the answering message repeats; {@link #answer} does that.
   *
   * @return the identifier
   */
  public String id() {
    return proto.getId();
  }

  /**
   * Name of the tool.
   *
   * @return the name
   */
  public String name() {
    return isCustom() ? proto.getCustom().getName() : proto.getFunction().getName();
  }

  /**
   * Whether this calls a free-form tool, whose input is text rather than JSON.
   *
   * @return whether it is
   */
  public boolean isCustom() {
    return proto.hasCustom();
  }

  /**
   * Exactly what the model wrote: usually JSON text; the input of a free-form tool.
   *
   * @return the text
   */
  public String rawArguments() {
    return isCustom() ? proto.getCustom().getInput() : proto.getFunction().getArgumentsJson();
  }

  /**
   * The arguments, parsed; no text counts as no arguments.
   *
   * @return names to values; whole numbers are {@code Long} unless the client's codec differs
   * @throws InvalidJsonException when the model wrote something other than a JSON object
   */
  public Map<String, Object> arguments() {
    return Json.object(json, argumentsText(), what());
  }

  /**
   * The arguments as a value of your own type.
   *
   * @param <T> the type
   * @param type a record or class with fields of the arguments' names
   * @return the value
   * @throws InvalidJsonException when the model wrote something else
   */
  public <T> T arguments(Class<T> type) {
    return type.cast(Json.read(json, argumentsText(), type, what()));
  }

  /**
   * The message that gives the model a result.
   *
   * @param result text as is, anything else as JSON
   * @return a message to append to the conversation, after the reply
   */
  public Message answer(Object result) {
    String text =
        result instanceof String given ? given : Json.write(json, result, "answer of " + name());
    return Message.tool(id(), text);
  }

  /**
   * The message of the contract.
   *
   * @return the message
   */
  public io.tokenwire.v1.ToolCall proto() {
    return proto;
  }

  private String argumentsText() {
    String text = rawArguments();
    return text.isBlank() && !isCustom() ? "{}" : text;
  }

  private String what() {
    return "arguments of the call of '" + name() + "' (" + id() + ")";
  }

  @Override
  public String toString() {
    return name() + "(" + rawArguments() + ")";
  }
}
