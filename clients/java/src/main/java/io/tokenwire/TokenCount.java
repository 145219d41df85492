package io.tokenwire;

import io.tokenwire.v1.CountTokensResponse;

/**
 * How many tokens an input has.
 *
 * @param totalTokens tokens
 * @param tokenizer tokenizer used, for example {@code o200k_base}
 * @param exact false when the tokenizer or the layout of the chat is an approximation
 * @param proto the message of the contract
 */
public record TokenCount(
    int totalTokens, String tokenizer, boolean exact, CountTokensResponse proto) {
  static TokenCount of(CountTokensResponse proto) {
    return new TokenCount(proto.getTotalTokens(), proto.getTokenizer(), proto.getExact(), proto);
  }
}
