package io.tokenwire;

import java.util.OptionalInt;

/**
 * Tokens used by one call.
 *
 * @param promptTokens input tokens, cached ones included
 * @param completionTokens output tokens, reasoning included
 * @param totalTokens the sum
 * @param estimated whether the gateway counted because the upstream did not report
 * @param proto the message of the contract
 */
public record Usage(
    int promptTokens,
    int completionTokens,
    int totalTokens,
    boolean estimated,
    io.tokenwire.v1.Usage proto) {

  static Usage of(io.tokenwire.v1.Usage proto) {
    return new Usage(
        proto.getPromptTokens(),
        proto.getCompletionTokens(),
        proto.getTotalTokens(),
        proto.getEstimated(),
        proto);
  }

  /**
   * Part of {@link #promptTokens} that was read from a cache.
   *
   * @return the tokens; empty if not reported
   */
  public OptionalInt cachedPromptTokens() {
    return proto.hasCachedPromptTokens()
        ? OptionalInt.of(proto.getCachedPromptTokens())
        : OptionalInt.empty();
  }

  /**
   * Part of {@link #completionTokens} that was spent on reasoning.
   *
   * @return the tokens; empty if not reported
   */
  public OptionalInt reasoningTokens() {
    return proto.hasReasoningTokens()
        ? OptionalInt.of(proto.getReasoningTokens())
        : OptionalInt.empty();
  }
}
