package io.tokenwire;

import io.tokenwire.v1.BatchChatItem;
import io.tokenwire.v1.BatchChatRequest;
import java.util.function.Consumer;

/** Independent conversations to have at once: 1 to 256. Immutable. */
public final class BatchParams {
  private final BatchChatRequest proto;

  private BatchParams(BatchChatRequest proto) {
    this.proto = proto;
  }

  /**
   * Begins with no item.
   *
   * @return a builder
   */
  public static Builder builder() {
    return new Builder();
  }

  /**
   * A request of the contract.
   *
   * @param proto the request
   * @return the same
   */
  public static BatchParams of(BatchChatRequest proto) {
    if (Checked.set(proto, "request").getItemsCount() == 0) {
      throw new IllegalArgumentException("items: expected at least one");
    }
    return new BatchParams(proto);
  }

  static BatchParams of(Consumer<Builder> set) {
    Builder builder = builder();
    Checked.set(set, "params").accept(builder);
    return builder.build();
  }

  /**
   * The message of the contract.
   *
   * @return the message
   */
  public BatchChatRequest proto() {
    return proto;
  }

  /** Sets what to ask. Not for several threads at once. */
  public static final class Builder {
    private final BatchChatRequest.Builder proto = BatchChatRequest.newBuilder();
    private Consumer<ChatParams.Builder> defaults = unused -> {};

    private Builder() {}

    /**
     * Sets what holds for each item that is added after this, before its own.
     *
     * @param defaults such as {@code c -> c.model("gpt-4o-mini")}
     * @return this
     */
    public Builder defaults(Consumer<ChatParams.Builder> defaults) {
      this.defaults = Checked.set(defaults, "defaults");
      return this;
    }

    /**
     * Adds a conversation of one message of the user.
     *
     * @param text the message
     * @return this
     */
    public Builder prompt(String text) {
      return item("", chat -> chat.user(text));
    }

    /**
     * Adds a conversation.
     *
     * @param customId a name for it, unique in the batch; repeated in its result
     * @param chat sets what to ask, over the defaults
     * @return this
     */
    public Builder item(String customId, Consumer<ChatParams.Builder> chat) {
      ChatParams.Builder builder = ChatParams.builder();
      try {
        defaults.accept(builder);
        Checked.set(chat, "chat").accept(builder);
        return item(customId, builder.build());
      } catch (IllegalArgumentException e) {
        String where = "items[" + proto.getItemsCount() + "]: ";
        throw new IllegalArgumentException(where + e.getMessage(), e);
      }
    }

    /**
     * Adds a conversation as it is, without the defaults.
     *
     * @param customId a name for it, unique in the batch; "" for none
     * @param chat what to ask
     * @return this
     */
    public Builder item(String customId, ChatParams chat) {
      proto.addItems(
          BatchChatItem.newBuilder()
              .setCustomId(Checked.text(customId, "customId"))
              .setChat(Checked.set(chat, "chat").proto()));
      return this;
    }

    /**
     * Sets how many items run at once.
     *
     * @param count in [0, 256]; 0, the default, leaves it to the gateway
     * @return this
     */
    public Builder maxConcurrency(int count) {
      proto.setMaxConcurrency(count);
      return this;
    }

    /**
     * Makes the parameters.
     *
     * @return the parameters
     * @throws IllegalArgumentException without an item
     */
    public BatchParams build() {
      return of(proto.build());
    }
  }
}
