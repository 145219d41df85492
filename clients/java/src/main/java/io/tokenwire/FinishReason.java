package io.tokenwire;

/** Why generation of a choice ended. */
public enum FinishReason {
  /** It has not ended. */
  UNFINISHED,
  /** Natural end or a stop string. */
  STOP,
  /** The limit of tokens or the context window was reached: the answer is cut. */
  LENGTH,
  /** The model called tools. */
  TOOL_CALLS,
  /** Content was withheld. */
  CONTENT_FILTER,
  /** Anything else; the upstream's own word is in the message of the contract. */
  OTHER;

  static FinishReason of(io.tokenwire.v1.FinishReason reason) {
    return switch (reason) {
      case FINISH_REASON_UNSPECIFIED -> UNFINISHED;
      case FINISH_REASON_STOP -> STOP;
      case FINISH_REASON_LENGTH -> LENGTH;
      case FINISH_REASON_TOOL_CALLS -> TOOL_CALLS;
      case FINISH_REASON_CONTENT_FILTER -> CONTENT_FILTER;
      case FINISH_REASON_OTHER, UNRECOGNIZED -> OTHER; // newer than this package
    };
  }

  io.tokenwire.v1.FinishReason proto() {
    return this == UNFINISHED
        ? io.tokenwire.v1.FinishReason.FINISH_REASON_UNSPECIFIED
        : io.tokenwire.v1.FinishReason.valueOf("FINISH_REASON_" + name());
  }
}
