/** The version of this package, as the gateway sees it in the user agent. */
export const VERSION = "0.1.0";
