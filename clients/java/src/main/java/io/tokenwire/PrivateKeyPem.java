package io.tokenwire;

import java.io.ByteArrayOutputStream;
import java.nio.charset.StandardCharsets;
import java.util.Base64;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * Private keys in PKCS #8, the one form that gRPC for Java reads. OpenSSL and others still write the
 * older ones, PKCS #1 for RSA and SEC 1 for elliptic curves: PKCS #8 is a wrapping around them.
 */
final class PrivateKeyPem {
  private static final Pattern OLDER =
      Pattern.compile(
          "-----BEGIN (RSA|EC) PRIVATE KEY-----\\s+([A-Za-z0-9+/=\\s]+)-----END \\1 PRIVATE"
              + " KEY-----");

  private static final int INTEGER = 0x02;
  private static final int OCTETS = 0x04;
  private static final int SEQUENCE = 0x30;
  private static final int CURVE = 0xa0; // [0] of SEC 1: the curve's name

  private static final byte[] VERSION = {INTEGER, 1, 0};
  private static final byte[] RSA = { // 1.2.840.113549.1.1.1, NULL
    0x06, 9, 0x2a, (byte) 0x86, 0x48, (byte) 0x86, (byte) 0xf7, 0x0d, 1, 1, 1, 0x05, 0
  };
  private static final byte[] EC = { // 1.2.840.10045.2.1
    0x06, 7, 0x2a, (byte) 0x86, 0x48, (byte) 0xce, 0x3d, 2, 1
  };

  private PrivateKeyPem() {}

  /** The same key in PKCS #8; what is neither of the older forms stays as it is. */
  static byte[] pkcs8(byte[] pem) {
    Matcher older = OLDER.matcher(new String(pem, StandardCharsets.ISO_8859_1));
    if (!older.find()) {
      return pem;
    }
    byte[] key;
    byte[] algorithm;
    try {
      key = Base64.getMimeDecoder().decode(older.group(2));
      algorithm = older.group(1).equals("RSA") ? RSA : join(EC, curve(key));
    } catch (IllegalArgumentException | IndexOutOfBoundsException e) {
      throw new IllegalArgumentException("key: the PEM file is damaged", e); // never its content
    }
    byte[] wrapped =
        element(SEQUENCE, join(VERSION, element(SEQUENCE, algorithm), element(OCTETS, key)));
    String text =
        "-----BEGIN PRIVATE KEY-----\n"
            + Base64.getMimeEncoder(64, new byte[] {'\n'}).encodeToString(wrapped)
            + "\n-----END PRIVATE KEY-----\n";
    return text.getBytes(StandardCharsets.US_ASCII);
  }

  /** The name of the curve within a SEC 1 key: SEQUENCE { version, key, [0] { name }, ... }. */
  private static byte[] curve(byte[] key) {
    int at = content(key, 0);
    while (at < key.length) {
      int start = content(key, at);
      int end = start + length(key, at);
      if ((key[at] & 0xff) == CURVE) {
        return java.util.Arrays.copyOfRange(key, start, end);
      }
      at = end;
    }
    throw new IllegalArgumentException("no curve");
  }

  private static int content(byte[] der, int at) {
    int first = der[at + 1] & 0xff;
    return at + 2 + (first < 0x80 ? 0 : first & 0x7f);
  }

  private static int length(byte[] der, int at) {
    int first = der[at + 1] & 0xff;
    if (first < 0x80) {
      return first;
    }
    int length = 0;
    for (int i = at + 2; i < content(der, at); i++) {
      length = length << 8 | der[i] & 0xff;
    }
    return length;
  }

  private static byte[] element(int tag, byte[] content) {
    int n = content.length;
    byte[] head =
        n < 0x80
            ? new byte[] {(byte) tag, (byte) n}
            : n < 0x100
                ? new byte[] {(byte) tag, (byte) 0x81, (byte) n}
                : new byte[] {(byte) tag, (byte) 0x82, (byte) (n >> 8), (byte) n};
    return join(head, content);
  }

  private static byte[] join(byte[]... parts) {
    ByteArrayOutputStream all = new ByteArrayOutputStream();
    for (byte[] part : parts) {
      all.writeBytes(part);
    }
    return all.toByteArray();
  }
}
