package io.tokenwire;

import io.tokenwire.v1.ResponseHeader;
import java.util.List;

/**
 * Facts about an answer that are known before its text.
 *
 * @param id identifier of the answer
 * @param model model that answers, after aliases and fallback
 * @param upstream configured upstream that answers
 * @param attempts upstream attempts, in order, the one that answers last
 * @param droppedParameters request fields that were dropped
 * @param proto the message of the contract
 */
public record ReplyHeader(
    String id,
    String model,
    String upstream,
    List<Attempt> attempts,
    List<String> droppedParameters,
    ResponseHeader proto) {

  /**
   * One try at one upstream with one key.
   *
   * @param upstream configured upstream
   * @param keyId configured name or fingerprint of the key
   * @param httpStatus HTTP status, 0 when none arrived
   * @param reason how it failed, such as {@code RATE_LIMITED}; "" for the one that answers
   */
  public record Attempt(String upstream, String keyId, int httpStatus, String reason) {}

  static ReplyHeader of(ResponseHeader proto) {
    return new ReplyHeader(
        proto.getId(),
        proto.getModel(),
        proto.getUpstream(),
        proto.getAttemptsList().stream()
            .map(
                each ->
                    new Attempt(
                        each.getUpstream(),
                        each.getKeyId(),
                        each.getHttpStatus(),
                        switch (each.getErrorReason()) {
                          case ERROR_REASON_UNSPECIFIED -> "";
                          case UNRECOGNIZED -> String.valueOf(each.getErrorReasonValue());
                          default -> each.getErrorReason().name().replace("ERROR_REASON_", "");
                        }))
            .toList(),
        List.copyOf(proto.getDroppedParametersList()),
        proto);
  }
}
