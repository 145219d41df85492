package io.tokenwire;

import io.tokenwire.v1.StreamChatResponse;

/** One event of a stream. */
public final class ChatEvent {
  /** What an event is. */
  public enum Kind {
    /** First: model, upstream, attempts. */
    HEADER,
    /** New text, reasoning or parts of tool calls. */
    DELTA,
    /** Everything so far; only of a cumulative stream. */
    SNAPSHOT,
    /** A choice ended. */
    FINISH,
    /** Last: the usage. */
    TRAILER
  }

  private final StreamChatResponse proto;
  private final Kind kind;
  private final String text;

  ChatEvent(StreamChatResponse proto, Kind kind, String text) {
    this.proto = proto;
    this.kind = kind;
    this.text = text;
  }

  /**
   * What this is.
   *
   * @return the kind
   */
  public Kind kind() {
    return kind;
  }

  /**
   * New answer text, of a cumulative stream too.
   *
   * @return the text; "" for an event without any
   */
  public String text() {
    return text;
  }

  /**
   * New reasoning text; of a cumulative stream, see the stream's own.
   *
   * @return the text; "" for an event without any
   */
  public String reasoning() {
    return proto.getDelta().getReasoning();
  }

  /**
   * Choice this belongs to.
   *
   * @return its index; 0 for header and trailer
   */
  public int choiceIndex() {
    return switch (kind) {
      case DELTA -> proto.getDelta().getChoiceIndex();
      case SNAPSHOT -> proto.getSnapshot().getChoiceIndex();
      case FINISH -> proto.getFinish().getChoiceIndex();
      case HEADER, TRAILER -> 0;
    };
  }

  /**
   * The message of the contract.
   *
   * @return the message
   */
  public StreamChatResponse proto() {
    return proto;
  }

  @Override
  public String toString() {
    return "ChatEvent[" + kind + ", " + text + "]";
  }
}
