package io.tokenwire;

import java.lang.reflect.Type;

/**
 * Turns JSON text into values and back. The client uses Gson, which gRPC brings along; implement
 * this to use the JSON library of your application, and give it to {@link
 * TokenwireClient.Builder#json}.
 */
public interface JsonCodec {
  /**
   * Writes a value as JSON text.
   *
   * @param value a map, a list, a record or whatever else the library can write
   * @return JSON text
   * @throws Exception if the value cannot be written
   */
  String write(Object value) throws Exception;

  /**
   * Parses JSON text.
   *
   * @param json the whole text
   * @param type what to make of it; {@code Object.class} for maps, lists, strings and numbers
   * @return a value of that type
   * @throws Exception if the text is not JSON, or not of that type
   */
  Object read(String json, Type type) throws Exception;

  /**
   * The codec that is used unless another is given.
   *
   * @return a codec based on Gson: strict, and whole numbers stay whole
   */
  static JsonCodec gson() {
    return Json.GSON;
  }
}
