package io.tokenwire;

/** The model wrote something other than the JSON that was asked for. */
public final class InvalidJsonException extends IllegalArgumentException {
  private static final long serialVersionUID = 1;

  /** What the model wrote. */
  private final String text;

  InvalidJsonException(String message, String text, Throwable cause) {
    super(message, cause);
    this.text = text;
  }

  /**
   * What the model wrote.
   *
   * @return the text, whole
   */
  public String text() {
    return text;
  }
}
