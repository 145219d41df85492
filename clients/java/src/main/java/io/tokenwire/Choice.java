package io.tokenwire;

import java.util.List;

/** One of the answers to one request. */
public final class Choice {
  private final io.tokenwire.v1.Choice proto;
  private final JsonCodec json;

  Choice(io.tokenwire.v1.Choice proto, JsonCodec json) {
    this.proto = proto;
    this.json = json;
  }

  /**
   * Position, from 0.
   *
   * @return the position
   */
  public int index() {
    return proto.getIndex();
  }

  /**
   * The whole message; append it to the conversation to go on.
   *
   * @return the message
   */
  public Message message() {
    return Message.of(proto.getMessage());
  }

  /**
   * The answer.
   *
   * @return the text; "" when there is none, as when the model only calls tools
   */
  public String text() {
    return proto.getMessage().getContent();
  }

  /**
   * What the model showed of its reasoning.
   *
   * @return the text; usually ""
   */
  public String reasoning() {
    return proto.getMessage().getReasoning();
  }

  /**
   * Why the model declined.
   *
   * @return the text; usually ""
   */
  public String refusal() {
    return proto.getMessage().getRefusal();
  }

  /**
   * Calls the model wants made.
   *
   * @return the calls, in order
   */
  public List<ToolCall> toolCalls() {
    return proto.getMessage().getToolCallsList().stream()
        .map(call -> new ToolCall(call, json))
        .toList();
  }

  /**
   * Why it ended.
   *
   * @return the reason; {@link FinishReason#UNFINISHED} while it grows
   */
  public FinishReason finishReason() {
    return FinishReason.of(proto.getFinishReason());
  }

  /**
   * The text, parsed as JSON.
   *
   * @return a map, list, string, number or boolean
   * @throws InvalidJsonException when it is not JSON, as after {@link FinishReason#LENGTH}
   */
  public Object json() {
    return json(Object.class);
  }

  /**
   * The text, parsed as JSON into your own type.
   *
   * @param <T> the type
   * @param type a record or class with fields of the schema's names
   * @return the value
   * @throws InvalidJsonException when it is not JSON of that type
   */
  public <T> T json(Class<T> type) {
    return type.cast(Json.read(json, text(), type, "answer (" + finishReason() + ")"));
  }

  /**
   * The message of the contract.
   *
   * @return the message
   */
  public io.tokenwire.v1.Choice proto() {
    return proto;
  }
}
