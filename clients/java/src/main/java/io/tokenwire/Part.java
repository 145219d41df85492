package io.tokenwire;

import com.google.protobuf.ByteString;
import io.tokenwire.v1.ContentPart;
import io.tokenwire.v1.Media;

/** One element of a message that holds more than text. Immutable. */
public final class Part {
  private final ContentPart proto;

  private Part(ContentPart.Builder proto) {
    this.proto = proto.build();
  }

  /**
   * Text.
   *
   * @param text the text
   * @return the part
   */
  public static Part text(String text) {
    return new Part(ContentPart.newBuilder().setText(Checked.text(text, "text")));
  }

  /**
   * An image at an address.
   *
   * @param url absolute {@code https:} or {@code data:} URL
   * @return the part
   */
  public static Part image(String url) {
    return new Part(
        ContentPart.newBuilder().setImage(Media.newBuilder().setUrl(Checked.text(url, "url"))));
  }

  /**
   * An image.
   *
   * @param data its bytes
   * @param mediaType such as {@code image/png}
   * @return the part
   */
  public static Part image(byte[] data, String mediaType) {
    return new Part(ContentPart.newBuilder().setImage(media(data, mediaType)));
  }

  /**
   * An audio clip.
   *
   * @param data its bytes
   * @param mediaType such as {@code audio/wav}
   * @return the part
   */
  public static Part audio(byte[] data, String mediaType) {
    return new Part(ContentPart.newBuilder().setAudio(media(data, mediaType)));
  }

  /**
   * A video.
   *
   * @param data its bytes
   * @param mediaType such as {@code video/mp4}
   * @return the part
   */
  public static Part video(byte[] data, String mediaType) {
    return new Part(ContentPart.newBuilder().setVideo(media(data, mediaType)));
  }

  /**
   * A document.
   *
   * @param data its bytes
   * @param mediaType such as {@code application/pdf}
   * @param filename its name
   * @return the part
   */
  public static Part file(byte[] data, String mediaType, String filename) {
    return new Part(
        ContentPart.newBuilder()
            .setFile(media(data, mediaType).setFilename(Checked.text(filename, "filename"))));
  }

  /**
   * A part of a type that is not listed here.
   *
   * @param json JSON object text that is sent upstream as it is
   * @return the part
   */
  public static Part raw(String json) {
    return new Part(ContentPart.newBuilder().setRawJson(Checked.text(json, "json")));
  }

  /**
   * A part of the contract, for what this class has no words for.
   *
   * @param proto the part
   * @return the same
   */
  public static Part of(ContentPart proto) {
    return new Part(Checked.set(proto, "part").toBuilder());
  }

  /**
   * The message of the contract.
   *
   * @return the message
   */
  public ContentPart proto() {
    return proto;
  }

  private static Media.Builder media(byte[] data, String mediaType) {
    if (Checked.text(mediaType, "mediaType").isEmpty()) {
      throw new IllegalArgumentException("mediaType: expected for example \"image/png\"");
    }
    return Media.newBuilder()
        .setData(ByteString.copyFrom(Checked.set(data, "data")))
        .setMediaType(mediaType);
  }
}
