package io.tokenwire;

import io.grpc.Metadata;
import java.time.Duration;

/** Refuses, with the place, what no call could carry. */
final class Checked {
  private Checked() {}

  static <T> T set(T value, String where) {
    if (value == null) {
      throw new IllegalArgumentException(where + ": expected a value, got null");
    }
    return value;
  }

  /** Text for a message: protobuf would send half a surrogate pair as a question mark. */
  static String text(String value, String where) {
    set(value, where);
    for (int i = 0; i < value.length(); i++) {
      char c = value.charAt(i);
      if (!Character.isSurrogate(c)) {
        continue;
      }
      if (Character.isHighSurrogate(c)
          && i + 1 < value.length()
          && Character.isLowSurrogate(value.charAt(i + 1))) {
        i++;
      } else {
        throw new IllegalArgumentException(
            where + ": holds half a surrogate pair at position " + i);
      }
    }
    return value;
  }

  /** A bearer token. The message never holds it: it ends up in logs. */
  static String token(String value) {
    set(value, "token");
    if (!value.chars().allMatch(c -> c > ' ' && c < 0x7f)) {
      throw new IllegalArgumentException(
          "token: holds a space, a line end or a character outside ASCII");
    }
    return value;
  }

  static String printable(String value, String where) {
    set(value, where);
    if (value.isEmpty() || !value.chars().allMatch(c -> c >= ' ' && c < 0x7f)) {
      throw new IllegalArgumentException(where + ": expected printable ASCII");
    }
    return value;
  }

  static Duration positive(Duration value, String where) {
    set(value, where);
    if (value.isNegative() || value.isZero()) {
      throw new IllegalArgumentException(where + ": expected more than 0, got " + value);
    }
    return value;
  }

  static Metadata.Key<String> key(String name) {
    set(name, "metadata");
    if (name.equalsIgnoreCase("authorization") || name.equalsIgnoreCase("x-request-id")) {
      throw new IllegalArgumentException(
          "metadata: '" + name + "' has its own option (token, requestId)");
    }
    if (name.endsWith(Metadata.BINARY_HEADER_SUFFIX)) {
      throw new IllegalArgumentException("metadata: '" + name + "': expected text, not -bin");
    }
    try {
      return Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER);
    } catch (IllegalArgumentException e) {
      throw new IllegalArgumentException("metadata: '" + name + "': " + e.getMessage(), e);
    }
  }
}
