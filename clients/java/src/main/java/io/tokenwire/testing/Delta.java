package io.tokenwire.testing;

import com.google.gson.Gson;
import io.tokenwire.v1.StreamChatResponse;
import io.tokenwire.v1.ToolCallDelta;
import java.time.Duration;

/** A piece of an answer that a {@link FakeGateway} gives. */
public final class Delta {
  final StreamChatResponse event;
  final Duration pause;

  private Delta(StreamChatResponse event, Duration pause) {
    this.event = event;
    this.pause = pause;
  }

  /**
   * Text of the first choice.
   *
   * @param text the text
   * @return the piece
   */
  public static Delta text(String text) {
    return text(0, text);
  }

  /**
   * Text of a choice.
   *
   * @param choiceIndex which choice
   * @param text the text
   * @return the piece
   */
  public static Delta text(int choiceIndex, String text) {
    return of(
        io.tokenwire.v1.Delta.newBuilder().setChoiceIndex(choiceIndex).setContent(text).build());
  }

  /**
   * Reasoning of the first choice.
   *
   * @param text the text
   * @return the piece
   */
  public static Delta reasoning(String text) {
    return of(io.tokenwire.v1.Delta.newBuilder().setReasoning(text).build());
  }

  /**
   * A call of a function, the only one of its answer.
   *
   * @param name the function
   * @param arguments text as it is, anything else as JSON
   * @return the piece
   */
  public static Delta toolCall(String name, Object arguments) {
    return toolCall(0, "call_1", name, arguments);
  }

  /**
   * A call of a function.
   *
   * @param index position of the call within the answer
   * @param id its identifier
   * @param name the function
   * @param arguments text as it is, anything else as JSON
   * @return the piece
   */
  public static Delta toolCall(int index, String id, String name, Object arguments) {
    String text = arguments instanceof String given ? given : new Gson().toJson(arguments);
    return of(
        io.tokenwire.v1.Delta.newBuilder()
            .addToolCalls(
                ToolCallDelta.newBuilder()
                    .setIndex(index)
                    .setId(id)
                    .setName(name)
                    .setArguments(text))
            .build());
  }

  /**
   * A delta of the contract.
   *
   * @param proto the delta
   * @return the piece
   */
  public static Delta of(io.tokenwire.v1.Delta proto) {
    return of(StreamChatResponse.newBuilder().setDelta(proto).build());
  }

  /**
   * Any event of the contract.
   *
   * @param event the event; an empty one is a heartbeat
   * @return the piece
   */
  public static Delta of(StreamChatResponse event) {
    return new Delta(event, Duration.ZERO);
  }

  /**
   * Silence before the next piece.
   *
   * @param time how long
   * @return the piece
   */
  public static Delta pause(Duration time) {
    return new Delta(null, time);
  }
}
