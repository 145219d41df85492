package io.tokenwire;

import io.tokenwire.v1.CustomTool;
import io.tokenwire.v1.FunctionTool;
import java.util.Map;

/** A tool the model may call. Immutable. */
public final class Tool {
  private final io.tokenwire.v1.Tool proto;

  private Tool(io.tokenwire.v1.Tool proto) {
    this.proto = proto;
  }

  /**
   * A function.
   *
   * @param name its name, of letters, digits, {@code _} and {@code -}
   * @param description what it does, for the model
   * @param parameters JSON Schema of the parameters; keep the order of keys with {@link
   *     java.util.LinkedHashMap}, or give the text
   * @return the tool
   */
  public static Tool function(String name, String description, Map<String, ?> parameters) {
    return function(
        name, description, Json.write(Json.GSON, Checked.set(parameters, name), "parameters"));
  }

  /**
   * A function.
   *
   * @param name its name, of letters, digits, {@code _} and {@code -}
   * @param description what it does, for the model
   * @param parameters JSON Schema text of the parameters
   * @return the tool
   */
  public static Tool function(String name, String description, String parameters) {
    return new Tool(
        io.tokenwire.v1.Tool.newBuilder()
            .setFunction(
                FunctionTool.newBuilder()
                    .setName(Checked.text(name, "name"))
                    .setDescription(Checked.text(description, "description"))
                    .setParametersSchemaJson(Checked.text(parameters, "parameters")))
            .build());
  }

  /**
   * A tool whose input is free text.
   *
   * @param name its name
   * @param description what it does, for the model
   * @return the tool
   */
  public static Tool custom(String name, String description) {
    return new Tool(
        io.tokenwire.v1.Tool.newBuilder()
            .setCustom(
                CustomTool.newBuilder()
                    .setName(Checked.text(name, "name"))
                    .setDescription(Checked.text(description, "description")))
            .build());
  }

  /**
   * A tool of a kind that is not listed here.
   *
   * @param json JSON object text of one element of the upstream's {@code tools}
   * @return the tool
   */
  public static Tool raw(String json) {
    return new Tool(
        io.tokenwire.v1.Tool.newBuilder().setRawJson(Checked.text(json, "json")).build());
  }

  /**
   * A tool of the contract.
   *
   * @param proto the tool
   * @return the same
   */
  public static Tool of(io.tokenwire.v1.Tool proto) {
    return new Tool(Checked.set(proto, "tool"));
  }

  /**
   * The same function, with its schema enforced by the upstream.
   *
   * @return the tool
   * @throws IllegalStateException if this is no function
   */
  public Tool strict() {
    if (!proto.hasFunction()) {
      throw new IllegalStateException("only a function can be strict");
    }
    return new Tool(
        proto.toBuilder().setFunction(proto.getFunction().toBuilder().setStrict(true)).build());
  }

  /**
   * The message of the contract.
   *
   * @return the message
   */
  public io.tokenwire.v1.Tool proto() {
    return proto;
  }
}
