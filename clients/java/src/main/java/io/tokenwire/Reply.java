package io.tokenwire;

import io.tokenwire.v1.ChatResponse;
import java.util.List;

/** A whole answer, or within an error what had arrived of one. */
public final class Reply implements Answer {
  private final ChatResponse proto;
  private final String requestId;
  private final JsonCodec json;

  Reply(ChatResponse proto, String requestId, JsonCodec json) {
    this.proto = proto;
    this.requestId = requestId;
    this.json = json;
  }

  @Override
  public List<Choice> choices() {
    return proto.getChoicesList().stream().map(choice -> new Choice(choice, json)).toList();
  }

  /**
   * Model, upstream, attempts, dropped parameters.
   *
   * @return the header
   */
  public ReplyHeader header() {
    return ReplyHeader.of(proto.getHeader());
  }

  /**
   * Tokens used.
   *
   * @return the usage; zeros where nobody reported it
   */
  public Usage usage() {
    return Usage.of(proto.getUsage());
  }

  /**
   * The call's {@code x-request-id}, to quote to whoever runs the gateway.
   *
   * @return the identifier
   */
  public String requestId() {
    return requestId;
  }

  /**
   * The message of the contract.
   *
   * @return the message
   */
  public ChatResponse proto() {
    return proto;
  }

  @Override
  public String toString() {
    String text = text();
    return "Reply["
        + (text.length() <= 60 ? text : text.substring(0, 60) + "…")
        + ", "
        + finishReason()
        + ", model="
        + proto.getHeader().getModel()
        + ", requestId="
        + requestId
        + "]";
  }
}
