/** Certificates made for a test, by an authority of its own. */

import { generateKeyPairSync, randomBytes } from "node:crypto";
import forge from "node-forge";

/** PEM texts, as `tls` of the client takes them. */
export interface Identity {
  readonly cert: string;
  readonly key: string;
}

/** An authority nobody else knows. */
export class Authority {
  readonly #keys = keys();
  readonly #issued = keys(); // one for all it issues: making one takes a while
  readonly #subject: forge.pki.CertificateField[];
  /** Its own certificate: what to trust. */
  readonly ca: string;

  constructor(name: string) {
    this.#subject = [{ name: "commonName", value: name }];
    const extensions = [
      { name: "basicConstraints", cA: true, critical: true },
      { name: "keyUsage", keyCertSign: true, critical: true },
    ];
    this.ca = this.#signed(this.#keys.publicKey, this.#subject, extensions);
  }

  /** A key with a certificate for this name and, if there is one, this IPv4 address. */
  issue(name: string, address?: string): Identity {
    const { publicKey, privatePem } = this.#issued;
    const altNames: object[] = [{ type: 2, value: name }];
    if (address !== undefined) altNames.push({ type: 7, ip: address });
    const subject = [{ name: "commonName", value: name }];
    const cert = this.#signed(publicKey, subject, [{ name: "subjectAltName", altNames }]);
    return { cert, key: privatePem };
  }

  #signed(
    publicKey: forge.pki.rsa.PublicKey,
    subject: forge.pki.CertificateField[],
    extensions: object[],
  ): string {
    const made = forge.pki.createCertificate();
    made.publicKey = publicKey;
    made.serialNumber = `01${randomBytes(8).toString("hex")}`;
    const day = 24 * 3600 * 1000;
    made.validity.notBefore = new Date(Date.now() - day);
    made.validity.notAfter = new Date(Date.now() + day);
    made.setSubject(subject);
    made.setIssuer(this.#subject);
    made.setExtensions(extensions);
    made.sign(this.#keys.privateKey, forge.md.sha256.create());
    return forge.pki.certificateToPem(made);
  }
}

function keys() {
  const { privateKey: privatePem } = generateKeyPairSync("rsa", {
    modulusLength: 2048,
    publicKeyEncoding: { type: "spki", format: "pem" },
    privateKeyEncoding: { type: "pkcs8", format: "pem" },
  });
  const privateKey = forge.pki.privateKeyFromPem(privatePem);
  return {
    privateKey,
    privatePem,
    publicKey: forge.pki.setRsaPublicKey(privateKey.n, privateKey.e),
  };
}
