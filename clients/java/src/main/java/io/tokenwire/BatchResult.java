package io.tokenwire;

import java.util.Optional;

/** How one item of a batch ended: with a reply or an error. */
public final class BatchResult {
  private final int index;
  private final String customId;
  private final Reply reply;
  private final TokenwireException error;

  BatchResult(int index, String customId, Reply reply, TokenwireException error) {
    this.index = index;
    this.customId = customId;
    this.reply = reply;
    this.error = error;
  }

  /**
   * Position among the items.
   *
   * @return the position, from 0
   */
  public int index() {
    return index;
  }

  /**
   * The item's own name.
   *
   * @return the name; "" when it had none
   */
  public String customId() {
    return customId;
  }

  /**
   * The answer.
   *
   * @return the reply; empty if it failed
   */
  public Optional<Reply> reply() {
    return Optional.ofNullable(reply);
  }

  /**
   * Why there is no answer.
   *
   * @return the error; empty if there is an answer
   */
  public Optional<TokenwireException> error() {
    return Optional.ofNullable(error);
  }

  /**
   * The answer, for those who expect one.
   *
   * @return the reply
   * @throws TokenwireException the item's error, if it failed
   */
  public Reply get() {
    if (error != null) {
      throw error;
    }
    return reply;
  }

  @Override
  public String toString() {
    return "BatchResult[" + index + ", " + customId + ", " + (error != null ? error : reply) + "]";
  }
}
