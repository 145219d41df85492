package io.tokenwire;

import com.google.protobuf.ByteString;
import io.tokenwire.v1.TokenList;
import java.util.List;

/**
 * The tokens of one text.
 *
 * @param ids token ids
 * @param pieces bytes of each token, in the order of the ids: a piece may be part of a character
 * @param proto the message of the contract
 */
public record Tokens(List<Integer> ids, List<byte[]> pieces, TokenList proto) {
  static Tokens of(TokenList proto) {
    return new Tokens(
        List.copyOf(proto.getIdsList()),
        proto.getPiecesList().stream().map(ByteString::toByteArray).toList(),
        proto);
  }
}
