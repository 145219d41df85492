package io.tokenwire;

import io.tokenwire.v1.Model;
import java.util.List;

/**
 * A model that can be asked.
 *
 * @param name name used in requests
 * @param aliases other names for it
 * @param upstream configured upstream
 * @param contextWindowTokens tokens of context; 0 when unknown
 * @param maxCompletionTokens cap on generated tokens; 0 when none
 * @param capabilities such as {@code tools}, {@code json_schema}, {@code vision}
 * @param tokenizer tokenizer used for counting
 * @param proto the message of the contract
 */
public record ModelInfo(
    String name,
    List<String> aliases,
    String upstream,
    int contextWindowTokens,
    int maxCompletionTokens,
    List<String> capabilities,
    String tokenizer,
    Model proto) {

  static ModelInfo of(Model proto) {
    return new ModelInfo(
        proto.getName(),
        List.copyOf(proto.getAliasesList()),
        proto.getUpstream(),
        proto.getContextWindowTokens(),
        proto.getMaxCompletionTokens(),
        List.copyOf(proto.getCapabilitiesList()),
        proto.getTokenizer(),
        proto);
  }
}
