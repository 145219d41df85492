package io.tokenwire;

import io.tokenwire.v1.ToolChoice.Mode;

/** Which tools the model may or must call. Immutable. */
public final class ToolChoice {
  /** The model decides. */
  public static final ToolChoice AUTO = of(Mode.MODE_AUTO);

  /** No calls. */
  public static final ToolChoice NONE = of(Mode.MODE_NONE);

  /** At least one call. */
  public static final ToolChoice REQUIRED = of(Mode.MODE_REQUIRED);

  private final io.tokenwire.v1.ToolChoice proto;

  private ToolChoice(io.tokenwire.v1.ToolChoice proto) {
    this.proto = proto;
  }

  /**
   * A call of one of these tools; of that tool, if it is one.
   *
   * @param names the tools' names
   * @return the choice
   */
  public static ToolChoice tool(String... names) {
    io.tokenwire.v1.ToolChoice.Builder choice = REQUIRED.proto.toBuilder();
    for (String name : names) {
      choice.addToolNames(Checked.text(name, "toolChoice"));
    }
    return new ToolChoice(choice.build());
  }

  /**
   * A choice of the contract.
   *
   * @param proto the choice
   * @return the same
   */
  public static ToolChoice of(io.tokenwire.v1.ToolChoice proto) {
    return new ToolChoice(Checked.set(proto, "toolChoice"));
  }

  private static ToolChoice of(Mode mode) {
    return of(io.tokenwire.v1.ToolChoice.newBuilder().setMode(mode).build());
  }

  /**
   * The message of the contract.
   *
   * @return the message
   */
  public io.tokenwire.v1.ToolChoice proto() {
    return proto;
  }
}
