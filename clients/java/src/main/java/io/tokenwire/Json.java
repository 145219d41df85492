package io.tokenwire;

import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.Strictness;
import com.google.gson.ToNumberStrategy;
import java.lang.reflect.Type;
import java.math.BigInteger;
import java.util.Map;

/** JSON text in and out, with errors that show what was there. */
final class Json {
  /** Gson's own default makes every number a double, which corrupts long identifiers. */
  private static final ToNumberStrategy WHOLE_STAYS_WHOLE =
      reader -> {
        String text = reader.nextString();
        if (text.matches("-?\\d+")) {
          BigInteger whole = new BigInteger(text);
          return whole.bitLength() < Long.SIZE ? (Number) whole.longValue() : whole;
        }
        return Double.valueOf(text);
      };

  static final JsonCodec GSON =
      new JsonCodec() {
        private final Gson gson =
            new GsonBuilder()
                .setStrictness(Strictness.STRICT)
                .disableHtmlEscaping()
                .serializeNulls()
                .setObjectToNumberStrategy(WHOLE_STAYS_WHOLE)
                .create();

        @Override
        public String write(Object value) {
          return gson.toJson(value);
        }

        @Override
        public Object read(String json, Type type) {
          return gson.fromJson(json, type);
        }
      };

  private Json() {}

  static String write(JsonCodec codec, Object value, String where) {
    try {
      return codec.write(value);
    } catch (Exception e) {
      throw new IllegalArgumentException(where + ": cannot be written as JSON: " + e, e);
    }
  }

  static Object read(JsonCodec codec, String text, Type type, String what) {
    try {
      Object value = codec.read(text, type);
      if (value == null && !text.strip().equals("null")) {
        throw new InvalidJsonException("the " + what + " is empty", text, null);
      }
      return value;
    } catch (InvalidJsonException e) {
      throw e;
    } catch (Exception e) {
      String wanted = type == Object.class ? "JSON" : "JSON of " + type.getTypeName();
      throw new InvalidJsonException(
          "the " + what + " is not " + wanted + ": " + start(text), text, e);
    }
  }

  @SuppressWarnings("unchecked") // a JSON object has text for keys
  static Map<String, Object> object(JsonCodec codec, String text, String what) {
    Object value = read(codec, text, Object.class, what);
    if (value instanceof Map) {
      return (Map<String, Object>) value;
    }
    throw new InvalidJsonException(
        "the " + what + " is not a JSON object: " + start(text), text, null);
  }

  private static String start(String text) {
    return "'" + (text.length() <= 80 ? text : text.substring(0, 80) + "…") + "'";
  }
}
