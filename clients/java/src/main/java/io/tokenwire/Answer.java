package io.tokenwire;

import java.util.List;

/** Whatever has choices, whole or growing, with shortcuts to the first of them. */
public interface Answer {
  /**
   * Answers, by index: one unless {@code choiceCount} asked for more.
   *
   * @return the answers
   */
  List<Choice> choices();

  /**
   * The first choice.
   *
   * @return the choice; an empty one when there is none
   */
  default Choice first() {
    List<Choice> choices = choices();
    return choices.isEmpty()
        ? new Choice(io.tokenwire.v1.Choice.getDefaultInstance(), JsonCodec.gson())
        : choices.get(0);
  }

  /**
   * The first choice's message; append it to the conversation to go on.
   *
   * @return the message
   */
  default Message message() {
    return first().message();
  }

  /**
   * The first choice's text.
   *
   * @return the text
   */
  default String text() {
    return first().text();
  }

  /**
   * The first choice's reasoning.
   *
   * @return the text; usually ""
   */
  default String reasoning() {
    return first().reasoning();
  }

  /**
   * The first choice's refusal.
   *
   * @return the text; usually ""
   */
  default String refusal() {
    return first().refusal();
  }

  /**
   * The first choice's tool calls.
   *
   * @return the calls, in order
   */
  default List<ToolCall> toolCalls() {
    return first().toolCalls();
  }

  /**
   * Why the first choice ended.
   *
   * @return the reason
   */
  default FinishReason finishReason() {
    return first().finishReason();
  }

  /**
   * The first choice's text, parsed as JSON.
   *
   * @return a map, list, string, number or boolean
   * @throws InvalidJsonException when it is not JSON
   */
  default Object json() {
    return first().json();
  }

  /**
   * The first choice's text, parsed as JSON into your own type.
   *
   * @param <T> the type
   * @param type a record or class with fields of the schema's names
   * @return the value
   * @throws InvalidJsonException when it is not JSON of that type
   */
  default <T> T json(Class<T> type) {
    return first().json(type);
  }
}
