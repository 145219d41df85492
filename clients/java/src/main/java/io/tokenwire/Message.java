package io.tokenwire;

import io.tokenwire.v1.ChatMessage;
import java.util.List;

/** One turn of a conversation. Immutable. */
public final class Message {
  private final ChatMessage proto;

  private Message(ChatMessage proto) {
    this.proto = proto;
  }

  /**
   * Instructions that come first.
   *
   * @param text the instructions
   * @return a message of role {@code system}
   */
  public static Message system(String text) {
    return of("system", text);
  }

  /**
   * What the user says.
   *
   * @param text the text
   * @return a message of role {@code user}
   */
  public static Message user(String text) {
    return of("user", text);
  }

  /**
   * What the user says and shows.
   *
   * @param parts text, images, audio, files, in order
   * @return a message of role {@code user}
   */
  public static Message user(Part... parts) {
    ChatMessage.Builder message = ChatMessage.newBuilder().setRole("user");
    for (Part part : Checked.set(parts, "parts")) {
      message.addParts(Checked.set(part, "parts").proto());
    }
    if (parts.length == 0) {
      throw new IllegalArgumentException("parts: expected at least one");
    }
    return new Message(message.build());
  }

  /**
   * What the model said earlier; of a reply, take {@link Reply#message}, which has its tool calls.
   *
   * @param text the text
   * @return a message of role {@code assistant}
   */
  public static Message assistant(String text) {
    return of("assistant", text);
  }

  /**
   * The answer to a tool call; {@link ToolCall#answer} makes it for you.
   *
   * @param toolCallId the call's identifier
   * @param text what came of it
   * @return a message of role {@code tool}
   */
  public static Message tool(String toolCallId, String text) {
    return new Message(
        of("tool", text).proto.toBuilder()
            .setToolCallId(Checked.text(toolCallId, "toolCallId"))
            .build());
  }

  /**
   * A message of any role.
   *
   * @param role {@code system}, {@code user}, ..., or a role of a role template
   * @param text the text
   * @return the message
   */
  public static Message of(String role, String text) {
    if (Checked.text(role, "role").isEmpty()) {
      throw new IllegalArgumentException("role: expected for example \"user\", got nothing");
    }
    return new Message(
        ChatMessage.newBuilder().setRole(role).setContent(Checked.text(text, role)).build());
  }

  /**
   * A message of the contract, for what this class has no words for.
   *
   * @param proto the message
   * @return the same
   */
  public static Message of(ChatMessage proto) {
    return new Message(Checked.set(proto, "message"));
  }

  /**
   * Who speaks.
   *
   * @return the role
   */
  public String role() {
    return proto.getRole();
  }

  /**
   * What is said.
   *
   * @return the text; "" when there is none
   */
  public String text() {
    return proto.getContent();
  }

  /**
   * The tool calls in it.
   *
   * @return the calls, in order
   */
  public List<ToolCall> toolCalls() {
    return proto.getToolCallsList().stream()
        .map(call -> new ToolCall(call, JsonCodec.gson()))
        .toList();
  }

  /**
   * The message of the contract.
   *
   * @return the message
   */
  public ChatMessage proto() {
    return proto;
  }

  @Override
  public boolean equals(Object other) {
    return other instanceof Message message && message.proto.equals(proto);
  }

  @Override
  public int hashCode() {
    return proto.hashCode();
  }

  @Override
  public String toString() {
    return role() + ": " + text();
  }
}
